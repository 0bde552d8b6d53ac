"""Template: a tree with a fixed shape; each node is given by ranks among the likeliest tokens.

Medusa's sparse tree (arXiv 2401.10774): node (0, 2) is the third likeliest token after the likeliest one. Choosing the
shape takes no time, and forwards have the same size in each round. `BestFirst` and `OptTree` adapt to the text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, MOST_NODES
from csdraft.decoding.tree import Growth
from csdraft.stored import shown

__all__ = ["Template"]

Path = tuple[int, ...]

EAGLE = (
    *[(a,) for a in range(4)],
    *[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)],
    *[(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)],
    *[(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)],
)
"""The 25 nodes of EAGLE's tree (arXiv 2401.15077)."""


@dataclass(frozen=True)
class Template(Tree):
    """Drafts the children that the template names, with one forward per level.

    Args:
        paths: for each node, the ranks of the tokens from the root to it, 0 for the likeliest. Ancestors are added.
    """

    paths: tuple[tuple[int, ...], ...] = EAGLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(tuple(path) for path in self.paths))
        ranks = {rank for path in self.paths for rank in path}
        fits = all(0 <= rank < MOST_BRANCHES for rank in ranks) and sum(map(len, self.shape.values())) <= MOST_NODES
        if not ranks or not fits:
            raise ValueError(
                f"paths={shown(self.paths)} of a template tree must be one or more paths of ranks from 0 to "
                f"{MOST_BRANCHES - 1}, with at most {MOST_NODES} nodes together"
            )

    @cached_property
    def shape(self) -> dict[Path, set[int]]:
        """Path of a node -> the ranks of its children."""
        shape: dict[Path, set[int]] = {}
        for path in self.paths:
            for end, rank in enumerate(path):
                shape.setdefault(path[:end], set()).add(rank)
        return shape

    def width(self, depth: int) -> int:
        return sum(len(ranks) for path, ranks in self.shape.items() if len(path) < depth)

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        paths: dict[int, Path] = {ROOT: ()}
        level: list[int] = [ROOT]
        for _ in range(depth):
            inner = [node for node in level if paths[node] in self.shape]
            if not inner:
                break
            yield Step(inner, 1 + max(max(self.shape[paths[node]]) for node in inner))
            level = []
            for node in growth.latest:
                above, rank = paths[growth.parents[node]], growth.ranks[node]
                if rank in self.shape[above]:
                    paths[node] = (*above, rank)
                    level.append(node)
        return [node for node in paths if node != ROOT]
