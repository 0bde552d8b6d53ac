"""Stochastic beam: on each level a few branches, drawn without replacement from all, continue.

RSD-S (arXiv 2402.14160) with stochastic beam search (arXiv 1903.06059): every branch has a Gumbel-perturbed log
probability, distributed as if all branches of its length had been perturbed at once. Unlikely branches end, so the
nodes go to the likely ones. Use it with `WithoutReplacement` where `Recursive` would waste nodes on unlikely branches.
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
    """Keeps the `beams` branches with the greatest perturbed log probability on each level; without noise, plain ones.

    Args:
        beams: nodes on each level.
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
    """The latest nodes' perturbed values, given that each sibling group's maximum is its parent's value (equation 5).

    Args:
        above: parent -> its perturbed value.
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
    """Maps the Gumbel `value` of a sibling group with maximum `top` to its value if the maximum were `wanted`."""
    below = log(-expm1(value - top)) if value < top else -inf
    v = wanted - value + below
    return wanted - max(0.0, v) - log1p(exp(-abs(v)))
