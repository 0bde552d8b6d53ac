"""Lead: a chain of the likeliest tokens; each level also has the next likeliest tokens, which get no children.

The tree variant of Cascade Speculative Drafting (arXiv 2312.11462): 8 children of each lead node, with the K matrix
[[1, 3], [0, 1]]. The drafter reads one node per level, so the tree costs it the same as a chain. Use it with drafters
that guess well, and whose second or third token is often right where the first is wrong.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.decoding.tree import Growth

__all__ = ["Lead"]


@dataclass(frozen=True)
class Lead(Tree):
    """Gives children to the first node of each level only.

    Args:
        children: children of each lead node; the likeliest of them is the next lead.
    """

    children: int = 8

    def __post_init__(self) -> None:
        check_range("a lead tree", self, children=MOST_BRANCHES)

    def width(self, depth: int) -> int:
        return self.children * depth

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        lead = ROOT
        for _ in range(depth):
            yield Step([lead], self.children)
            if not growth.latest:
                break
            lead = growth.latest[0]
        return range(len(growth))
