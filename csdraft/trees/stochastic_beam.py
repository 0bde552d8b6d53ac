"""Stochastic beam: the best of all branches go on, and which are best is drawn, without replacement.

RSD-S (arXiv 2402.14160) on stochastic beam search (arXiv 1903.06059): every branch carries a Gumbel-perturbed log
probability, distributed as if all branches of its length had been perturbed at once. Branches that the drafter doubts
die out, and the nodes go where they count. Use it with `WithoutReplacement` where `Recursive` would branch in vain.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import exp, expm1, inf, log, log1p
from typing import ClassVar

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.decoding.tree import Growth

__all__ = ["StochasticBeam"]


@dataclass(frozen=True)
class StochasticBeam(Tree):
    """Keeps the `beams` branches of the greatest perturbed log probability at each level; by plain ones if none is.

    Args:
        beams: nodes a level.
    """

    draws: ClassVar = "without_replacement"

    beams: int = 4

    def __post_init__(self) -> None:
        check_range("a stochastic beam", self, beams=MOST_BRANCHES)

    def width(self, depth: int) -> int:
        return self.beams * depth

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        level, values, kept = [ROOT], {ROOT: 0.0}, []
        for _ in range(depth):
            yield Step(level, self.beams)
            values = _conditional(growth, values) if growth.perturbed else {n: growth.paths[n] for n in growth.latest}
            level = sorted(values, key=lambda node: (-values[node], node))[: self.beams]
            kept += level
        return kept


def _conditional(growth: Growth, above: dict[int, float]) -> dict[int, float]:
    """The latest nodes' perturbed values, given that the greatest of each family is its parent's (eq. 5 of the paper).

    Args:
        above: of the parents.
    """
    values: dict[int, float] = {}
    top = 0.0
    for node in growth.latest:
        parent = growth.parents[node]
        own = growth.path(parent) + growth.perturbed[node]
        if growth.ranks[node] == 0:
            top = own
        values[node] = conditional_maximum(above[parent], own, top)
    return values


def conditional_maximum(wanted: float, value: float, top: float) -> float:
    """Maps a Gumbel `value` of a family whose greatest is `top` to what it is if the greatest is `wanted`."""
    below = log(-expm1(value - top)) if value < top else -inf
    v = wanted - value + below
    return wanted - max(0.0, v) - log1p(exp(-abs(v)))
