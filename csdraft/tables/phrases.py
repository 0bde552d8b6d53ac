"""A pool of phrases by the token they follow, the newest of each kept: what Lookahead and Ouroboros draft from."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

__all__ = ["PhrasePool"]


class PhrasePool:
    """The newest distinct phrases that followed each token. Threads may share it.

    Args:
        length: tokens of a phrase.
        most: phrases kept a token; the one not seen for longest goes first.
    """

    def __init__(self, length: int, most: int):
        self.length, self.most = length, most
        self._phrases: dict[int, dict[tuple[int, ...], None]] = {}  # in the order they were last seen
        self._lock = threading.Lock()

    @classmethod
    def of(cls, target: Any, length: int, most: int) -> PhrasePool:
        """The pool of this kind that this process keeps for a target, until the target is gone."""
        with _LOCK:
            return _POOLS.setdefault(target, {}).setdefault((length, most), cls(length, most))

    def add(self, token: int, phrase: tuple[int, ...]) -> None:
        """Notes that `phrase`, of `length` tokens, followed `token`."""
        with self._lock:
            kept = self._phrases.setdefault(token, {})
            kept.pop(phrase, None)
            kept[phrase] = None
            if len(kept) > self.most:
                del kept[next(iter(kept))]

    def read(self, tokens: Sequence[int], start: int = 0) -> None:
        """Adds the phrases of a text that begin at `start` or later and are whole."""
        for at in range(max(start, 0), len(tokens) - self.length):
            self.add(tokens[at], tuple(tokens[at + 1 : at + 1 + self.length]))

    def after(self, token: int, most: int) -> list[tuple[int, ...]]:
        """At most `most` phrases that followed `token`, the newest first."""
        with self._lock:
            kept = self._phrases.get(token)
            return [] if kept is None else list(kept)[: -most - 1 : -1]


_POOLS: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], PhrasePool]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
