"""Sequoia: the best tree shape, given how often the target accepts the first, second, third child of a node.

Sequoia (arXiv 2402.12374): dynamic programming over nodes, levels and ranks finds the shape with the most expected
tokens, once for all texts. Children are drawn without replacement. Measure the acceptance of your own pair of models
first (`Sequoia.measured`). Use it where every round should have the same shape, or under independent draws, where
trees that choose by confidence draft point masses.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_NODES, check_range
from csdraft.decoding.tree import Growth
from csdraft.stored import shown
from csdraft.trees.template import Path, Template

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["Sequoia"]

MOST_RANKS, MOST_LEVELS = 32, 64
"""The most children of a node, and levels of a tree: the time to find a shape grows with both."""


@dataclass(frozen=True)
class Sequoia(Tree):
    """The best shape for a measured acceptance.

    Args:
        nodes: nodes of the draft.
        acceptance: how often a node's first child is accepted, its second, and so on. No node gets more children.
    """

    draws: ClassVar = "without_replacement"

    nodes: int = 24
    acceptance: tuple[float, ...] = (0.6, 0.14, 0.06, 0.04, 0.02)

    def __post_init__(self) -> None:
        object.__setattr__(self, "acceptance", tuple(self.acceptance))
        check_range("a sequoia tree", self, nodes=MOST_NODES)
        known = 0 < len(self.acceptance) <= MOST_RANKS
        if not known or not min(self.acceptance) >= 0 or not sum(self.acceptance) <= 1 + 1e-9:
            raise ValueError(
                f"acceptance={shown(list(self.acceptance))} of a sequoia tree must be 1 to {MOST_RANKS} probabilities "
                "with a sum of at most 1, since at most one sibling is accepted; measure it with Sequoia.measured"
            )

    @classmethod
    def measured(cls, report: Report, nodes: int = 24, reviewer: str = "target") -> Sequoia:
        """The shape for the acceptance measured in earlier calls. Ranks that no call drafted get no children.

        Args:
            report: the report of these calls. They should sample as later calls will: acceptance depends on it.
            nodes: nodes of the draft.
            reviewer: name of a reviewer in the report; its decisions are counted.
        """
        counts = report.reviews[reviewer].ranks
        rates = []
        for rank in range(max((children for children, _ in counts), default=0)):
            tried = sum(times for (children, _), times in counts.items() if children > rank)
            rates.append(sum(times for (_, kept), times in counts.items() if kept == rank) / tried)
        if not rates:
            raise ValueError(
                f"{reviewer!r} of this report reviewed no branches; measure with a tree, such as Template()"
            )
        within = takewhile(lambda total: total <= 1, accumulate(rates))  # rates of different nodes can sum to more
        return cls(nodes, tuple(rates[: len(list(within))]))

    def plan(self, depth: int) -> tuple[Path, ...]:
        """The best tree of at most `depth` levels, as the paths of a `Template`."""
        return best_shape(self.nodes, min(depth, self.nodes, MOST_LEVELS), self.acceptance)

    def width(self, depth: int) -> int:
        return len(self.plan(depth)) if depth else 0

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        return (yield from Template(self.plan(depth)).grow(growth, depth))


@lru_cache(64)
def best_shape(nodes: int, depth: int, acceptance: tuple[float, ...]) -> tuple[Path, ...]:
    """The tree of at most `nodes` nodes and `depth` levels with the most expected accepted tokens.

    `worth[d, r, n]` is that number for n nodes below a node that has d levels left and children from rank r on.
    `own[d, r, n]` of the n nodes go to child r and the tree below it. A child is drafted only if those before it are.
    """
    ranks = len(acceptance)
    worth = np.zeros((depth + 1, ranks + 1, nodes + 1))
    own = np.zeros((depth + 1, ranks, nodes + 1), dtype=int)
    for levels in range(1, depth + 1):
        for rank in reversed(range(ranks)):
            child = acceptance[rank] * (1 + worth[levels - 1, 0])  # with 0, 1, ... nodes below it
            for count in range(1, nodes + 1):
                totals = child[:count] + worth[levels, rank + 1, :count][::-1]  # (count,) by nodes below the child
                share = int(totals.argmax())
                if totals[share] > 0:
                    worth[levels, rank, count], own[levels, rank, count] = totals[share], share + 1
    paths: list[Path] = []
    _unfold(own, (), nodes, paths)
    return tuple(paths)


def _unfold(own: np.ndarray, above: Path, count: int, paths: list[Path]) -> None:
    """Adds to `paths` the best `count` nodes below the node `above`."""
    levels = len(own) - 1 - len(above)
    for rank in range(own.shape[1]):
        if not levels or not (share := int(own[levels, rank, count])):
            break
        paths.append((*above, rank))
        _unfold(own, (*above, rank), share - 1, paths)
        count -= share
