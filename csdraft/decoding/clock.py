"""The clock for everything that a call measures. Tests replace it by a simulated device."""

from __future__ import annotations

import time

import torch

__all__ = ["Mark", "now"]


def now() -> float:
    """Seconds since some moment. Callers write `clock.now()`, so that replacing it here replaces it everywhere."""
    return time.perf_counter()


class Mark:
    """A moment in a device's work: on a GPU, the moment when everything queued so far is done."""

    def __init__(self, device: torch.device):
        self.host, self.event = now(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark to this one; by the host's clock if the device has not reached this one yet."""
        if self.event is None or earlier.event is None or not self.event.query():
            return self.host - earlier.host
        return earlier.event.elapsed_time(self.event) / 1e3
