"""Pairs: two children per node, one of them the drafter's likeliest token, for the verifier `SpecHub`.

SpecHub (arXiv 2411.05289): the pair is drawn so that its optimal transport to the target's distribution has a closed
form. Use it where a node gets at most two children; for wider trees `Recursive` is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from csdraft.trees._branching import Branching

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs(Branching):
    """A binary tree down to a level; below that level it has chains.

    Args:
        branching: children, 1 or 2, of the root, of each of its children, and so on; deeper nodes have one child.
    """

    draws: ClassVar = "pair"
    most: ClassVar = 2

    branching: tuple[int, ...] = (2, 2)
