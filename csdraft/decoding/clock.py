"""The clock that everything in a call is timed by; tests put a simulated device in its place."""

from __future__ import annotations

import time

__all__ = ["now"]


def now() -> float:
    """Seconds since some moment. Callers write `clock.now()`, so that replacing it here replaces it everywhere."""
    return time.perf_counter()
