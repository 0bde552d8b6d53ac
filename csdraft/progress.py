"""Shows what a long command is doing and how long it will take, on the standard error by default."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]

FORMAT = "{desc}: {percentage:.0f}%, about {remaining} left"
PAUSE = 10.0
"""Seconds between two lines, if the stream is a file."""


class Progress:
    """Call it with the current task and the share that is done.

    A share below the last one starts another task, with its own clock.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.bar: tqdm | None = None

    def __call__(self, what: str, share: float = 0.0) -> None:
        if self.bar is None or share < self.bar.n:
            self.close()
            moving = self.stream.isatty()
            pause = 0.1 if moving else PAUSE
            self.bar = tqdm(
                total=1.0, desc=what, file=self.stream, bar_format=FORMAT, leave=not moving, mininterval=pause
            )
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(share - self.bar.n)
        self.bar.n = share  # without the rounding of a sum
        if share >= 1:
            self.close()

    def close(self) -> None:
        """Ends the current task."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
