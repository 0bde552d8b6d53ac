"""Shows what a long command is doing and how long it will take, on the standard error by default."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress"]

PAUSE = 10.0
"""Seconds between two lines, if the stream is a file."""


class Progress:
    """Call it with the current task and the share that is done. A terminal shows one line, a file gets a few lines.

    A share below the last one starts another task, with its own clock.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.moving = self.stream.isatty()
        self._started = self._last = time.monotonic()
        self._share = self._begun = 0.0

    def __call__(self, what: str, share: float = 0.0) -> None:
        now = time.monotonic()
        if share < self._share:
            self._started, self._begun = now, 0.0
        self._share = share
        if not self.moving and share < 1 and now - self._last < PAUSE:
            return
        self._last = now
        done = share - self._begun
        left = (now - self._started) * (1 - share) / done if done > 0 else 0.0
        text = f"{what}: {share:.0%}" + (f", about {left:.0f} s left" if left > 0 else "")
        if self.moving:
            self.stream.write(f"\r\x1b[K{text}" if share < 1 else "\r\x1b[K")
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def restart(self, share: float = 0.0) -> None:
        """Begins another task, of which `share` is done already."""
        self._started = self._last = time.monotonic()
        self._share = self._begun = share

    def finish(self, what: str, share: float = 1.0) -> None:
        """Writes a task's last line, which stays also in a terminal."""
        self._share = share
        clear = "\r\x1b[K" if self.moving else ""
        self.stream.write(f"{clear}{what}: {share:.0%}\n")
        self.stream.flush()
