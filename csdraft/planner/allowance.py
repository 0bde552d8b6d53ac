"""The time limit of a tuning run, and progress as a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Allowance"]

ALMOST = 0.99
"""The largest share that `tell` reports; 1 is only reported at the end."""


@dataclass
class Allowance:
    """Measures the seconds of work that has several parts.

    Args:
        seconds: the most that the whole may take; infinity for no limit.
        say: called with what is being done and the share of the time that has passed.
        now: the clock.
    """

    seconds: float
    say: Callable[[str, float], None]
    now: Callable[[], float] = time.monotonic
    _share: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._started = self.now()

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return self.now() - self._started

    @property
    def remaining(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.seconds - self.passed, 0.0)

    def tell(self, what: str, left: float) -> None:
        """Reports the share of the time that has passed; `left` is an estimate of the seconds that remain.

        The share never falls: a falling share would look like the start of other work.
        """
        passed, left = self.passed, min(left, self.remaining)
        share = passed / (passed + left) if passed + left > 0 else 0.0
        self._share = min(max(self._share, share), ALMOST)
        self.say(what, self._share)
