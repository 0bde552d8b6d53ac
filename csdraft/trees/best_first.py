"""Best-first: expands the model's likeliest branches level by level, then keeps the likeliest nodes of all levels.

EAGLE-2's dynamic tree (arXiv 2406.16858): a drafter's confidence predicts acceptance well, so the product of the
confidences along a branch estimates how likely it is to be kept. Use it with any model drafter at small batch sizes,
where a wider forward of the target is nearly free.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, MOST_NODES, check_range
from csdraft.decoding.tree import Growth

__all__ = ["BestFirst"]


@dataclass(frozen=True)
class BestFirst(Tree):
    """Expands the `branches` likeliest nodes of each level, and keeps the `nodes` likeliest of all.

    Args:
        branches: nodes expanded on each level, and children of each.
        nodes: nodes of the draft.
    """

    branches: int = 4
    nodes: int = 24

    def __post_init__(self) -> None:
        check_range("a best_first tree", self, branches=MOST_BRANCHES, nodes=MOST_NODES)

    def width(self, depth: int) -> int:
        return min(self.nodes, self.branches + (depth - 1) * self.branches**2) if depth else 0

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        frontier, most = [ROOT], max(self.branches, self.nodes)
        for _ in range(depth):
            yield Step(frontier, self.branches, most)
            frontier = growth.best(growth.latest, self.branches)
        return growth.best(range(len(growth)), self.nodes)
