"""What forwards and drafted tokens cost, by warm measurements, and how likely drafted tokens are to be kept.

A drafter's memory holds one `Learned` for each target and way of decoding. Noise only makes a measurement longer, so
the price of a shape is the lower quartile of its last few measurements. A shape without measurements gets its price
from the nearest shape that has some.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median_high
from typing import Any, NamedTuple

from csdraft.stored import fit

__all__ = ["STREAK", "Costs", "Learned", "Survival", "Widths", "check_costs"]

KEPT = 12
"""Measurements that are kept for each shape."""
SLOPE = 0.02
"""Assumed cost of one more query, as a share of a step. It is low, since all queries share one read of the weights."""
DOUBT = 1.25
"""A single measurement counts as at most this many times its neighbours' price, until it is repeated."""
BELIEVED = 2
"""The price of a shape is settled after this many measurements."""
SHORT = 9
"""Up to 2 ** SHORT slots are one bucket; above that, each power of two is a bucket."""
NARROW = 64
"""Forwards of more queries read a prompt: they count as of the power of two below, so that few prices are kept."""
FADE = 0.98
"""Each round multiplies the earlier counts by this, so about the last 50 rounds count."""
PRIOR, PRIOR_WEIGHT = (0.6, 0.3, 0.45, 0.65, 0.8), 2.0
"""Prior chance that a draft's first token is kept, by evidence (the longer a match, the higher), and its weight."""
LATER_PRIOR, LATER_WEIGHT = 0.75, 6.0
"""Prior chance that a token after a kept one is kept too, and its weight in tokens."""
TWICE, NEVER_OFFERED = 1.5, 0.05
"""NEVER_OFFERED is the chance that a draft's first token is kept, if one was asked for twice with this evidence (more
than TWICE, since counts fade) and there was none."""
REMEMBERED = 4.0
"""An optimistic estimate counts at most this many failed rounds, since texts change."""
CHAIN, SPARED = 4, 0.8
"""Prior: a tree of CHAIN nodes fails as often as a chain; each doubling of its nodes multiplies that by SPARED."""
MOST_BORROWED = 16.0
"""The results of trees of other sizes count as at most this many rounds."""
STREAK, AFTER_STREAK = 8, 0.85
"""STREAK is added to the evidence of a row that kept all of its last draft; AFTER_STREAK is its prior survival."""


def _quartile(samples: deque[float]) -> float:
    """The lower quartile."""
    return sorted(samples)[(len(samples) - 1) // 4]


@dataclass
class Widths:
    """Seconds of a forward by its width (number of queries), for one number of rows and bucket of slots.

    Attributes:
        centres: width -> the lower quartile of the last warm measurements.
        counts: width -> how many these are.
        bounds: width -> the shortest cold forward, an upper bound for a warm one.
    """

    centres: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    bounds: dict[int, float] = field(default_factory=dict)
    _samples: dict[int, deque[float]] = field(default_factory=dict, repr=False, compare=False)
    _priced: dict[int, float] = field(default_factory=dict, repr=False, compare=False)
    _points: dict[int, float] = field(default_factory=dict, repr=False, compare=False)  # widths ascending

    def add(self, width: int, seconds: float, warm: bool = True) -> None:
        """Adds one measured forward."""
        self._priced, self._points = {}, {}
        if warm:
            kept = self._samples.setdefault(width, deque(maxlen=KEPT))
            kept.append(seconds)
            self.centres[width], self.counts[width] = _quartile(kept), len(kept)
        else:
            self.bounds[width] = min(seconds, self.bounds.get(width, math.inf))

    def known(self, width: int) -> bool:
        """Whether it was measured warm."""
        return width in self.centres

    def count(self, width: int) -> int:
        """Number of warm measurements."""
        return self.counts.get(width, 0)

    def first_run(self, width: int) -> float:
        """Expected extra seconds of the first run of this width; 0 if it has run, or nothing is known."""
        if width in self.centres or width in self.bounds:
            return 0.0
        excess = [self.bounds[w] - centre for w, centre in self.centres.items() if w in self.bounds]
        return max(median_high(excess), 0.0) if excess else 0.0

    def seconds(self, width: int) -> float:
        """The price: measured, or from the nearest widths; at most a wider forward's. In steps if none is known."""
        if width not in self._priced:
            self._points = self._points or self._known_points()
            self._priced[width] = _between(self._points, width)
        return self._priced[width]

    def _known_points(self) -> dict[int, float]:
        """Width -> price: settled prices, and single measurements limited to DOUBT times their neighbours' price."""
        settled = {w: centre for w, centre in sorted(self.centres.items()) if self._is_settled(w, centre)}
        points = dict(settled)
        for width in (self.centres | self.bounds).keys() - settled.keys():
            alone = min(self.centres.get(width, math.inf), self.bounds.get(width, math.inf))
            points[width] = min(alone, DOUBT * _between(settled, width)) if settled else alone
        widths = sorted(points)
        falling = list(accumulate((points[width] for width in reversed(widths)), min))
        return dict(zip(widths, reversed(falling), strict=True))

    def _is_settled(self, width: int, centre: float) -> bool:
        """Whether there are two warm measurements, or a warm and a cold one that agree."""
        return self.counts[width] >= BELIEVED or self.bounds.get(width, math.inf) < DOUBT * centre


def _steps(width: int) -> float:
    """The assumed cost of this many queries, in steps."""
    return 1 + SLOPE * (width - 1)


def _between(points: Mapping[int, float], width: int) -> float:
    """Interpolates between known widths, which ascend, and extrapolates with SLOPE. In steps if none is known."""
    if width in points or not points:
        return points.get(width, _steps(width))
    known = list(points)
    place = bisect_left(known, width)
    if place in (0, len(known)):
        nearest = known[min(place, len(known) - 1)]
        return points[nearest] * _steps(width) / _steps(nearest)
    below, above = known[place - 1], known[place]
    return points[below] + (width - below) / (above - below) * (points[above] - points[below])


class Way(NamedTuple):
    """A way to draft: without the first `skip` stages of a cascade, in trees of at most `size` nodes."""

    skip: int
    size: int | None = None


Group = tuple[int, int]
"""(batch rows, bucket of slots)."""


@dataclass
class Costs:
    """Seconds of the target's forwards by shape, and seconds of a drafted token.

    Attributes:
        groups: the target's forwards.
        stages: stage of the drafter -> the last measured seconds of a drafted token.
    """

    groups: dict[Group, Widths] = field(default_factory=dict)
    stages: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, rows: int, queries: int, slots: int, seconds: float, warm: bool) -> None:
        """Adds one forward of the target; `seconds` is the time of its round without drafting."""
        queries = queries if queries <= NARROW else 1 << (queries.bit_length() - 1)
        self.groups.setdefault((rows, _bucket(slots)), Widths()).add(queries, seconds, warm)

    def add_prepared(self, costs: Iterable[tuple[tuple[int, int, int, int], float]]) -> None:
        """Adds measurements of `prepare`, as (shape, seconds), for shapes that no text has used yet."""
        for (rows, queries, slots, _), seconds in costs:
            widths = self.groups.setdefault((rows, _bucket(slots)), Widths())
            if not widths.known(queries):
                widths.add(queries, seconds)

    def add_token(self, stage: int, seconds: float) -> None:
        """Adds the seconds that a stage took for each token of a draft."""
        self.stages.setdefault(stage, deque(maxlen=KEPT)).append(seconds)

    def token(self, stage: int, prior: float) -> float:
        """Seconds of a stage's token; `prior` if unknown. A single measurement is limited to 2 * DOUBT * prior."""
        known = self.stages.get(stage)
        if not known:
            return prior
        return min(known[0], 2 * DOUBT * prior) if len(known) < BELIEVED and prior else _quartile(known)

    def widths(self, rows: int, slots: int) -> Widths:
        """Prices for this many rows and slots: those measured, and the rest from the nearest group."""
        group = rows, _bucket(slots)
        own = self.groups.get(group, Widths())
        others = [other for other in self.groups if other != group]
        if not others:
            return own
        near = self.groups[min(others, key=lambda g: (abs(math.log2(g[0] / rows)), abs(g[1] - group[1])))]
        if not own.centres:
            return Widths(near.centres, near.counts, near.bounds | own.bounds)
        factor = median_high([centre / near.seconds(width) for width, centre in own.centres.items()])
        nearby = {width: factor * centre for width, centre in near.centres.items()}
        return Widths(nearby | own.centres, near.counts | own.counts, own.bounds)

    def to_list(self) -> list[list[float]]:
        """[rows, bucket, queries, seconds] of every shape, and [0, 0, stage, seconds] of every stage's token."""
        shapes = [
            [rows, bucket, width, centre]
            for (rows, bucket), widths in sorted(self.groups.items())
            for width, centre in sorted(widths.centres.items())
        ]
        return shapes + [[0, 0, stage, _quartile(kept)] for stage, kept in sorted(self.stages.items())]

    @classmethod
    def from_list(cls, table: list[tuple[int, int, int, float]]) -> Costs:
        """The inverse of `to_list`. Each price counts as one measurement, so new ones soon replace it."""
        costs = cls()
        for rows, bucket, width, seconds in table:
            if rows:
                costs.groups.setdefault((rows, bucket), Widths()).add(width, seconds)
            else:
                costs.add_token(width, seconds)
        return costs


def _bucket(slots: int) -> int:
    return max((max(slots, 1) - 1).bit_length(), SHORT)


MOST_ROWS, MOST_BUCKET, MOST_QUERIES, MOST_SECONDS, MOST_ENTRIES = 1 << 20, 40, 1 << 20, 3600.0, 10_000


def check_costs(document: Any, at: str) -> dict[str, list[tuple[int, int, int, float]]]:
    """Checks saved cost tables, by device and target; raises a ValueError that names the wrong entry."""
    tables = fit(document, dict[str, list[tuple[int, int, int, float]]], at)
    for name, table in tables.items():
        if len(table) > MOST_ENTRIES:
            raise ValueError(f"{at}.{name} has {len(table)} entries; at most {MOST_ENTRIES} are allowed")
        for i, (rows, bucket, width, seconds) in enumerate(table):
            whole = 0 <= rows <= MOST_ROWS and 0 <= bucket <= MOST_BUCKET and 0 <= width <= MOST_QUERIES
            if not (whole and width >= bool(rows) and 0 < seconds <= MOST_SECONDS):
                raise ValueError(
                    f"{at}.{name}[{i}]={[rows, bucket, width, seconds]} must be rows, bucket of slots and queries, "
                    f"all >= 0, and seconds from 0 to {MOST_SECONDS:.0f}; delete the file to measure again"
                )
    return tables


@dataclass
class Survival:
    """Results of drafts made in one way, by position in the draft: which tokens were offered, and which were kept."""

    prior: float = PRIOR[0]  # prior chance that the first token is kept
    later_prior: float = LATER_PRIOR  # prior chance that a token after a kept one is kept too
    weight: float = PRIOR_WEIGHT  # weight of the priors, in rounds
    failing: float = 1.0  # share of a chain's failures that happen in trees of this size too
    tried: list[float] = field(default_factory=list)  # rounds that kept the first i tokens and asked for one more
    kept: list[float] = field(default_factory=list)  # rounds among `tried` that kept that one too
    asked: list[float] = field(default_factory=list)  # rounds that asked for token i
    offered: list[float] = field(default_factory=list)  # rounds among `asked` that got it
    losses: int = 0  # trials in a row that did not make it the best choice
    wait: float = 0.0  # seconds until the next trial

    def add(self, asked: int, offered: int, accepted: int) -> None:
        """Adds one round of one row: tokens asked for, drafted, and kept."""
        for column in (self.tried, self.kept, self.asked, self.offered):
            column[:] = [FADE * count for count in column] + [0.0] * (asked - len(column))
        for i in range(asked):
            self.asked[i] += 1
            self.offered[i] += i < offered
            if i <= accepted:
                self.tried[i] += 1
                self.kept[i] += i < accepted

    def fade(self, share: float) -> None:
        """Multiplies the counts of kept tokens by `share`, since texts change. The share of offered tokens stays."""
        for column in (self.tried, self.kept):
            column[:] = [share * count for count in column]

    def survival_rates(self, depth: int, optimistic: bool = False) -> list[float]:
        """(depth,) the chance that each token is kept, given that those before it were.

        The first token has its own estimate, since a draft is often wrong from the start. Later tokens behave alike
        and are tried less often, so a pooled estimate is their prior.

        Args:
            optimistic: assume that unknown tokens are kept, except those that are not offered.
        """
        if not depth:
            return []
        tried, kept = self.tried or [0.0], self.kept or [0.0]
        if optimistic:
            share = min(1.0, REMEMBERED / max(tried[0], 1.0))
            tried, kept = [share * count for count in tried], [share * count for count in kept]
            prior, later_prior, weight, later_weight = 1.0, 1.0, PRIOR_WEIGHT, PRIOR_WEIGHT
        else:  # a larger tree fails less often than the chain that the priors are for
            prior, later_prior = (1 - self.failing * (1 - chance) for chance in (self.prior, self.later_prior))
            weight, later_weight = self.weight, max(self.weight, LATER_WEIGHT)
        never_offered = bool(self.asked) and self.asked[0] > TWICE and not self.offered[0]  # a copy without a match
        first = NEVER_OFFERED if never_offered else (kept[0] + weight * prior) / (tried[0] + weight)
        pooled = (sum(kept[1:]) + later_weight * max(first, later_prior)) / (sum(tried[1:]) + later_weight)
        later = [(k + weight * pooled) / (t + weight) for k, t in zip(kept[1:depth], tried[1:], strict=False)]
        found = [first, *later, *[pooled] * (depth - 1 - len(later))]
        return [min(pair) for pair in zip(found, self.shares_offered(depth), strict=True)] if optimistic else found

    def borrow_priors(self, others: Sequence[Survival]) -> None:
        """Takes its priors from the results of trees of other sizes, converted to a chain."""

        def chance(count: Callable[[list[float]], float], usual: float) -> float:
            expected = sum(other.failing * count(other.tried) for other in others)
            failed = sum(count(other.tried) - count(other.kept) for other in others)
            return max(1 - (failed + PRIOR_WEIGHT * (1 - usual)) / (expected + PRIOR_WEIGHT), 0.0)

        self.prior = chance(lambda counts: counts[0], PRIOR[0])
        self.later_prior = chance(lambda counts: sum(counts[1:]), LATER_PRIOR)
        self.weight = PRIOR_WEIGHT + min(sum(other.tried[0] for other in others), MOST_BORROWED)

    def shares_offered(self, depth: int) -> list[float]:
        """(depth,) the share of rounds in which each token was drafted when it was asked for."""
        known = [(offered + 1) / (asked + 1) for offered, asked in zip(self.offered[:depth], self.asked, strict=False)]
        return known + [known[-1] if known else 1.0] * (depth - len(known))


@dataclass
class Learned:
    """All that a call has learned; the next call starts from it."""

    costs: Costs = field(default_factory=Costs)
    survivals: dict[tuple[int, Way], Survival] = field(default_factory=dict)  # by evidence and way
    rounds: int = 0  # of all calls

    def survival(self, evidence: int, way: Way) -> Survival:
        """The results with this evidence and this way; its priors come from other sizes, or from other evidence."""
        known = self.survivals.setdefault((evidence, way), Survival())
        known.failing = SPARED ** math.log2(max(way.size or CHAIN, CHAIN) / CHAIN)
        tried = [(e, w, s) for (e, w), s in self.survivals.items() if s.tried]
        if other_sizes := [s for e, w, s in tried if e == evidence and w != way and w.skip == way.skip]:
            known.borrow_priors(other_sizes)
            return known
        usual = _prior(evidence)
        kept = expected = PRIOR_WEIGHT * usual  # first tokens
        for other_evidence, other in [(e, s) for e, w, s in tried if w == way and e != evidence]:
            kept += other.kept[0]
            expected += _prior(other_evidence) * other.tried[0] * other.shares_offered(1)[0]
        known.prior = min(usual * kept / expected, AFTER_STREAK)
        return known


def _prior(evidence: int) -> float:
    """The prior chance that a draft's first token is kept."""
    if evidence >= STREAK:
        return AFTER_STREAK
    return PRIOR[evidence] if 0 <= evidence < len(PRIOR) else PRIOR[0]
