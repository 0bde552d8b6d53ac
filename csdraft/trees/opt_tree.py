"""OptTree: of all trees of so many nodes, the one that the drafter expects most accepted tokens of.

OPT-Tree (arXiv 2406.17276): a branch is kept with about the product of the drafter's probabilities, and the sum of
those products is what a tree is worth; the likeliest nodes of all are the best tree. It stops deepening once a level
adds too little to that sum. Use it with a drafter that knows how sure it may be, at a width the target reads for free.
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
    """The `nodes` likeliest nodes, level by level while that pays.

    Args:
        nodes: nodes of the draft, and the most that are expanded a level.
        threshold: in tokens; no further level once the last one added no more than this to what is expected. The
            drafter's time for a level, in forwards of the target, is the least that makes sense.
    """

    nodes: int = 24
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_range("an opt_tree", self, nodes=MOST_NODES)
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold} of an opt_tree must be tokens, 0 or more")

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
