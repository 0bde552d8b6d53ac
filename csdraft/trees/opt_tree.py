"""OptTree: the tree of a given number of nodes that has the most expected accepted tokens by the drafter's estimate.

OPT-Tree (arXiv 2406.17276): a node is kept with about the product of the drafter's probabilities down to it, so the
expected accepted tokens of a tree are the sum of these products. The best tree therefore has the likeliest nodes. It
stops when another level adds too little to the sum. Use it with a drafter whose probabilities are well calibrated, and
with a number of nodes that costs the target nearly nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import exp

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_NODES, check_range
from csdraft.decoding.tree import Growth

__all__ = ["OptTree"]


@dataclass(frozen=True)
class OptTree(Tree):
    """Drafts the `nodes` likeliest nodes, level by level while that pays.

    Args:
        nodes: nodes of the draft, and the most that are expanded on a level.
        threshold: in tokens; growth stops when a level adds no more than this to the expected tokens. It should be at
            least the drafter's time for a level divided by the target's time for a forward.
    """

    nodes: int = 24
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_range("an opt_tree", self, nodes=MOST_NODES)
        check_range("an opt_tree", self, 0, threshold=None)

    def width(self, depth: int) -> int:
        return self.nodes if depth else 0

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        level, best, expected = [ROOT], [], 0.0
        for _ in range(depth):
            yield Step(level, self.nodes, self.nodes)
            level = growth.best(growth.latest, self.nodes)
            best, before = growth.best([*best, *level], self.nodes), expected
            expected = sum(exp(growth.paths[node]) for node in best)
            if not expected - before > self.threshold:
                break
        return best
