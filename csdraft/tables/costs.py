"""What forwards cost and how drafts survive, measured: kept from call to call, forgotten with the models."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Ledger", "Memory", "Survival", "Widths"]

FADE = 0.97
"""Weight that a round's counts keep after each later one: a memory of about 33 rounds."""
PRIOR, PRIOR_WEIGHT = 0.7, 2.0
"""Survival of one more token before anything is known: hopeful, so that every stage gets its chance."""


@dataclass
class Widths:
    """Seconds of a forward by width: medians where measured, a line through them elsewhere."""

    samples: dict[int, deque] = field(default_factory=dict)
    _medians: dict[int, float] = field(default_factory=dict)

    def add(self, width: int, seconds: float) -> None:
        kept = self.samples.setdefault(width, deque(maxlen=9))
        kept.append(seconds)
        self._medians[width] = sorted(kept)[(len(kept) - 1) // 2]

    def known(self, width: int) -> bool:
        return width in self._medians

    def seconds(self, width: int) -> float:
        """Measured, interpolated, or extrapolated from the nearest measured width; never decreasing outwards."""
        known = self._medians
        if width in known:
            return known[width]
        below = max((w for w in known if w < width), default=None)
        above = min((w for w in known if w > width), default=None)
        if below is not None and above is not None:
            share = (width - below) / (above - below)
            return known[below] + share * (known[above] - known[below])
        if below is not None:  # to the right of everything: the slope from the narrowest on
            first = min(known)
            slope = (known[below] - known[first]) / (below - first) if below > first else 0.02 * known[below]
            return known[below] + max(slope, 0.0) * (width - below)
        return known[above] if above is not None else 0.0


@dataclass
class Survival:
    """What drafting from one stage on has shown: which tokens were offered, and how many survived, by position."""

    tried: list[float] = field(default_factory=list)  # rounds that kept the first i tokens and asked for one more
    kept: list[float] = field(default_factory=list)  # of these, how many kept that one too
    asked: list[float] = field(default_factory=list)  # rounds that asked for token i
    offered: list[float] = field(default_factory=list)  # of these, how many got it
    losses: int = 0  # trials in a row that did not make it the best choice
    wait: float = 0.0  # seconds until the next trial

    def add(self, asked: int, offered: int, accepted: int) -> None:
        """One row's round."""
        for column in (self.tried, self.kept, self.asked, self.offered):
            column[:] = [FADE * count for count in column]
        for column in (self.tried, self.kept, self.asked, self.offered):
            column += [0.0] * (asked - len(column))
        for i in range(asked):
            self.asked[i] += 1
            self.offered[i] += i < offered
            if i <= accepted:
                self.tried[i] += 1
                self.kept[i] += i < accepted

    def fade(self, share: float) -> None:
        """Lets what survived so far count less: texts change. What a stage has to offer does not."""
        for column in (self.tried, self.kept):
            column[:] = [share * count for count in column]

    def hopes(self, depth: int) -> list[float]:
        """The hazards if all that is not known yet turned out well; a token that is not offered cannot survive."""
        known = [(k + PRIOR_WEIGHT) / (t + PRIOR_WEIGHT) for k, t in zip(self.kept[:depth], self.tried, strict=False)]
        pooled = (sum(self.kept) + PRIOR_WEIGHT) / (sum(self.tried) + PRIOR_WEIGHT)
        hopes = known + [pooled] * (depth - len(known))
        return [min(hope, share) for hope, share in zip(hopes, self.shares_offered(depth), strict=True)]

    def hazards(self, depth: int) -> list[float]:
        """The chance of each of `depth` tokens to survive, given that those before it did."""
        pooled = (sum(self.kept) + PRIOR_WEIGHT * PRIOR) / (sum(self.tried) + PRIOR_WEIGHT)
        known = [
            (kept + PRIOR_WEIGHT * pooled) / (tried + PRIOR_WEIGHT)
            for kept, tried in zip(self.kept[:depth], self.tried, strict=False)
        ]
        return known + [pooled] * (depth - len(known))

    def shares_offered(self, depth: int) -> list[float]:
        """How often each of `depth` tokens was drafted when asked for."""
        known = [(offered + 1) / (asked + 1) for offered, asked in zip(self.offered[:depth], self.asked, strict=False)]
        return known + [known[-1] if known else 1.0] * (depth - len(known))


@dataclass
class Ledger:
    """All that one call has learned, and what the next one starts from."""

    target: Widths = field(default_factory=Widths)
    survivals: dict[tuple[int, int], Survival] = field(default_factory=dict)  # by evidence and stages left out
    token_seconds: dict[int, float] = field(default_factory=dict)  # by stage: seconds a drafted token

    def survival(self, evidence: int, skip: int) -> Survival:
        """What drafting showed with this evidence and without the first `skip` stages."""
        return self.survivals.setdefault((evidence, skip), Survival())


Entries = dict[Hashable, tuple[list, Any]]


class Memory:
    """What earlier calls have learned, by target and drafter; forgets models that are gone. Locked.

    Args:
        make: what a call starts from that has no earlier one.
    """

    def __init__(self, make: Callable[[], Any] = Ledger) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._ledgers: weakref.WeakKeyDictionary[Any, Entries] = weakref.WeakKeyDictionary()

    def load(self, target: Any, models: Sequence[Any], key: Hashable) -> Any:
        with self._lock:
            refs, ledger = self._ledgers.get(target, {}).get(key, ([], None))
            if ledger is None or [ref() for ref in refs] != list(models):
                return self._make()
            return deepcopy(ledger)

    def save(self, target: Any, models: Sequence[Any], key: Hashable, ledger: Any) -> None:
        with self._lock:
            kept = self._ledgers.setdefault(target, {})
            for old in [k for k, (refs, _) in kept.items() if any(ref() is None for ref in refs)]:
                del kept[old]
            kept[key] = ([weakref.ref(model) for model in models], ledger)

    def clear(self) -> None:
        with self._lock:
            self._ledgers.clear()
