"""A pool of the newest phrases after each token, which Lookahead and Ouroboros draft from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from csdraft.tables._kept import kept_for

__all__ = ["PhrasePool"]


class PhrasePool:
    """The newest distinct phrases that followed each token. Threads may share it.

    Args:
        length: tokens of a phrase.
        most: phrases kept for each token; the one seen longest ago is dropped first.
    """

    def __init__(self, length: int, most: int):
        self.length, self.most = length, most
        self._phrases: dict[int, dict[tuple[int, ...], None]] = {}  # in the order they were last seen
        self._lock = threading.Lock()

    @classmethod
    def of(cls, target: Any, length: int, most: int) -> PhrasePool:
        """The pool with this length and size that the process keeps for a target, until the target is gone."""
        return kept_for(target, (cls, length, most), lambda: cls(length, most))

    def add(self, token: int, phrase: tuple[int, ...]) -> None:
        """Adds `phrase`, of `length` tokens, as the newest after `token`."""
        with self._lock:
            kept = self._phrases.setdefault(token, {})
            kept.pop(phrase, None)
            kept[phrase] = None
            if len(kept) > self.most:
                del kept[next(iter(kept))]

    def read(self, tokens: Sequence[int], start: int = 0) -> None:
        """Adds all complete phrases of a text after the tokens from `start` on."""
        for at in range(max(start, 0), len(tokens) - self.length):
            self.add(tokens[at], tuple(tokens[at + 1 : at + 1 + self.length]))

    def after(self, token: int, most: int) -> list[tuple[int, ...]]:
        """At most `most` phrases that followed `token`, the newest first."""
        with self._lock:
            kept = self._phrases.get(token)
            return [] if kept is None else list(kept)[: -most - 1 : -1]
