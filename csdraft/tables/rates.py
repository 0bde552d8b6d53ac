"""How often a guess was the target's next token, by the kind of guess, to compare guesses of several kinds."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from csdraft.tables._kept import kept_for

__all__ = ["Copy", "SourceRates"]

LENGTHS = (2, 3, 5, 9, 17)
"""Match lengths are grouped: from each of these lengths on, a copy is of the next kind."""
COPIED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85)
"""Prior share of copied tokens that are right, by kind of match length."""
EARLIER, UNSEEN, SECOND, FIRST = 0.6, 0.6, 0.9, 0.6
"""EARLIER multiplies that share for a copy from an earlier output. UNSEEN does for a token that is not among the
remembered successors, SECOND for one that is, but not first. For the first one, FIRST multiplies the share of errors.
"""
RANKED = (0.4, 0.13, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02)
"""Prior chance that a remembered successor occurs again, by its rank, where no copy was right."""
COPIES, RANKS = 8.0, 40.0
"""The weights of these two priors, in tokens."""
FADE = 0.998
"""Each token multiplies the earlier counts by this, so about the last 500 tokens count."""


class Copy(NamedTuple):
    """The kind of a copied token.

    Attributes:
        earlier: whether it was copied from an earlier output; else it is from the text itself.
        length: the kind of match length, by `LENGTHS`.
        rank: 0 if it is the first remembered successor of the token before, 1 if another, 2 if none of them, 3 if no
            successors are remembered.
    """

    earlier: bool
    length: int
    rank: int

    @classmethod
    def of(cls, token: int, earlier: bool, matched: int, successors: Sequence[int]) -> Copy:
        """The kind of a token that followed a match of `matched` tokens."""
        if not successors:
            rank = 3
        else:
            rank = 0 if token == successors[0] else 1 if token in successors else 2
        return cls(earlier, bisect_right(LENGTHS, matched), rank)

    @property
    def prior(self) -> float:
        """The prior share of such tokens that are right."""
        share = COPIED[self.length] * (EARLIER if self.earlier else 1.0)
        return (1 - FIRST * (1 - share), SECOND * share, UNSEEN * share, share)[self.rank]


class SourceRates:
    """How often guesses were right, for one target and way of decoding. Threads may share it.

    Attributes:
        ranks: (8,) the chance of each remembered successor of a token, best first, if no copy is right.
    """

    def __init__(self) -> None:
        self._copies: dict[Copy, tuple[float, float]] = {}  # right, and tried
        self._counts, self._total = [RANKS * prior for prior in RANKED], RANKS
        self.ranks = list(RANKED)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, target: Any, way: Hashable) -> SourceRates:
        """The rates that the process keeps for a target and a way of decoding, until the target is gone."""
        return kept_for(target, (cls, way), cls)

    def chance(self, copy: Copy) -> float:
        """The chance that a copied token of this kind is right."""
        right, tried = self._copies.get(copy) or (COPIES * copy.prior, COPIES)
        return right / tried

    def learn(self, token: int, copy: Copy | None, copied: int, successors: Sequence[int]) -> None:
        """Learns from a token that the target wrote.

        Args:
            copy: the kind of the guess `copied`; None if nothing was copied.
            successors: the remembered successors of the token before, best first; empty if there are none.
        """
        with self._lock:
            if copy is not None:
                right, tried = self._copies.get(copy) or (COPIES * copy.prior, COPIES)
                self._copies[copy] = FADE * right + (copied == token), FADE * tried + 1
            if successors and (copy is None or copied != token):
                self._total = FADE * self._total + 1
                self._counts = [FADE * n + (other == token) for n, other in zip(self._counts, successors, strict=True)]
                self.ranks = [count / self._total for count in self._counts]
