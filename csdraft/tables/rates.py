"""How often a target's next token was the one that a source named: what makes the guesses of several comparable."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

__all__ = ["Copy", "SourceRates"]

LENGTHS = (2, 3, 5, 9, 17)
"""Lengths of a match from which on a copy is of the next kind."""
COPIED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85)
"""Share of copied tokens that are right, by the length of the match, before anything is known."""
EARLIER, UNSEEN, SECOND, FIRST = 0.6, 0.6, 0.9, 0.6
"""Of that share, what is left where the copy is from an earlier output; where it is none of the remembered successors;
where it is one of them, but not the first. Where it is the first: what is left of the share that is wrong."""
RANKED = (0.4, 0.13, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02)
"""Share of a token's remembered successors that come again, by rank, where no copy was right: before it is known."""
COPIES, RANKS = 8.0, 40.0
"""Tokens that these priors count for."""
FADE = 0.998
"""Weight that counts keep after each token: a memory of about 500."""


class Copy(NamedTuple):
    """The kind of a copied token.

    Attributes:
        earlier: whether it is from an earlier output; else from the text itself.
        length: of the match, by `LENGTHS`.
        rank: among the remembered successors of the token before: 0 for the first, 1 for another, 2 for none of them;
            3 if nothing is remembered.
    """

    earlier: bool
    length: int
    rank: int

    @classmethod
    def of(cls, token: int, earlier: bool, matched: int, successors: Sequence[int]) -> Copy:
        """Of a token that followed a match of so many tokens."""
        if not successors:
            rank = 3
        else:
            rank = 0 if token == successors[0] else 1 if token in successors else 2
        return cls(earlier, bisect_right(LENGTHS, matched), rank)

    @property
    def prior(self) -> float:
        """The share of such tokens that are right, before anything is known."""
        share = COPIED[self.length] * (EARLIER if self.earlier else 1.0)
        return (1 - FIRST * (1 - share), SECOND * share, UNSEEN * share, share)[self.rank]


class SourceRates:
    """For one target and way of decoding: which guesses were right. Threads may share it.

    Attributes:
        ranks: (8,) the chance of each remembered successor of a token, best first, where no copy is right.
    """

    def __init__(self) -> None:
        self._copies: dict[Copy, tuple[float, float]] = {}  # right, and tried
        self._counts, self._total = [RANKS * prior for prior in RANKED], RANKS
        self.ranks = list(RANKED)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, target: Any, way: Hashable) -> SourceRates:
        """Those that this process keeps for a target and a way of decoding, until the target is gone."""
        with _LOCK:
            return _RATES.setdefault(target, {}).setdefault(way, cls())

    def chance(self, copy: Copy) -> float:
        """Of a copied token to be right."""
        right, tried = self._copies.get(copy) or (COPIES * copy.prior, COPIES)
        return right / tried

    def learn(self, token: int, copy: Copy | None, copied: int, successors: Sequence[int]) -> None:
        """Takes in a token that the target wrote.

        Args:
            copy: the kind of `copied`, the token that was guessed; None if there was none.
            successors: what was remembered to follow the token before, best first; empty if nothing was.
        """
        with self._lock:
            if copy is not None:
                right, tried = self._copies.get(copy) or (COPIES * copy.prior, COPIES)
                self._copies[copy] = FADE * right + (copied == token), FADE * tried + 1
            if successors and (copy is None or copied != token):
                self._total = FADE * self._total + 1
                self._counts = [FADE * n + (other == token) for n, other in zip(self._counts, successors, strict=True)]
                self.ranks = [count / self._total for count in self._counts]


_RATES: weakref.WeakKeyDictionary[Any, dict[Hashable, SourceRates]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
