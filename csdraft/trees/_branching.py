"""The base of trees with a fixed number of children on each level: every node is expanded, and all nodes are kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import ClassVar

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, MOST_NODES
from csdraft.decoding.tree import Growth
from csdraft.stored import shown

__all__ = ["Branching"]


@dataclass(frozen=True)
class Branching(Tree):
    """Gives every node of a level the same number of children.

    Args:
        branching: children of the root, of each of its children, and so on; on deeper levels a node has one child.
    """

    most: ClassVar[int] = MOST_BRANCHES
    """The most children of a node."""

    branching: tuple[int, ...] = (3, 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "branching", tuple(self.branching))
        each = all(1 <= count <= self.most for count in self.branching)
        if not each or self.width(len(self.branching)) > MOST_NODES:
            raise ValueError(
                f"branching={shown(list(self.branching))} of a {type(self).__name__} tree must be numbers from 1 to "
                f"{self.most}, and at most {MOST_NODES} nodes together"
            )

    def children(self, depth: int) -> list[int]:
        """(depth,) children of a node on each level of a tree of this depth."""
        return [*self.branching, *[1] * depth][:depth]

    def width(self, depth: int) -> int:
        return sum(accumulate(self.children(depth), mul))

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        level: Sequence[int] = [ROOT]
        for count in self.children(depth):
            yield Step(level, count)
            level = growth.latest
        return range(len(growth))
