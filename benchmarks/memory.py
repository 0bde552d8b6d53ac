"""Peak memory of a stretch of code: the growth of the process, or of what is allocated on a CUDA device."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

PROCESS = Path("/proc/self")


class PeakMemory:
    """While entered, watches memory; afterwards `peak` is the most bytes above the start, None where unknown.

    On the CPU it is the process's resident memory (Linux only). What the allocator holds in reserve is given back
    first, but not all of it, so small figures are lower bounds.
    """

    def __init__(self, device: torch.device):
        self.cuda = device if device.type == "cuda" else None
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self._start: int | None = torch.cuda.memory_allocated(self.cuda)
        else:
            self._start = _restart_process_peak()
        return self

    def __exit__(self, *error: object) -> None:
        if self._start is not None:
            now = torch.cuda.max_memory_allocated(self.cuda) if self.cuda is not None else _status("VmHWM")
            self.peak = max(now - self._start, 0)


def _restart_process_peak() -> int | None:
    """Bytes resident now, the peak set back to it; None if this system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {key} in {PROCESS / 'status'}")
