"""The clock that everything in a call is timed by; tests put a simulated device in its place."""

from __future__ import annotations

import time

import torch

__all__ = ["Mark", "now"]


def now() -> float:
    """Seconds since some moment. Callers write `clock.now()`, so that replacing it here replaces it everywhere."""
    return time.perf_counter()


class Mark:
    """A moment in a device's work: on a GPU, when it has done all that it was asked for so far.

    Args:
        device: that works.
    """

    def __init__(self, device: torch.device):
        self.host, self.event = now(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark to this one; of the host, if the device has not reached this one yet."""
        if self.event is None or earlier.event is None or not self.event.query():
            return self.host - earlier.host
        return earlier.event.elapsed_time(self.event) / 1e3
