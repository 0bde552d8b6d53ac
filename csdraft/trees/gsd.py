"""Gsd: branches that reach the same tokens are drafted once, and share what follows.

Graph-structured speculative decoding (arXiv 2407.16207): when a branch reaches tokens that another branch already has,
it is not drafted further but gets an edge to that branch. For the target the graph is unrolled into a tree, where one
continuation can be below several branches. Use it if a drafter's alternatives often lead to the same tokens.

The shared continuation was drafted in another context; this can only cost acceptance. Two things differ from the
paper: the likeliest branches are unrolled first, and no token is drawn: all are point masses.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf, log

from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Step, Tree
from csdraft.decoding.limits import MOST_BRANCHES, MOST_NODES, check_range
from csdraft.decoding.tree import Growth

__all__ = ["Gsd"]


@dataclass(frozen=True)
class Gsd(Tree):
    """Expands nodes that no other branch has, and unrolls the graph (see the module).

    Args:
        branches: children of a node.
        nodes: nodes of the draft, copies of shared ones included.
        sibling_share: children less likely than this share of the likeliest one are left out.
        least: a child less likely than this is kept, but gets no children.
        context: two nodes are the same if their tokens agree, and this many tokens before them.
    """

    branches: int = 4
    nodes: int = 24
    sibling_share: float = 0.1
    least: float = 0.1
    context: int = 1

    def __post_init__(self) -> None:
        check_range("a gsd tree", self, branches=MOST_BRANCHES, nodes=MOST_NODES)
        check_range("a gsd tree", self, 0, context=None, sibling_share=1, least=1)

    def width(self, depth: int) -> int:
        return self.nodes if depth else 0

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        graph = Graph(growth, self.context)
        level = [ROOT]
        for _ in range(depth):
            yield Step(level, self.branches, self.nodes)
            fresh = [node for node in growth.latest if self._passes(growth, node) and graph.take(node)]
            level = growth.best((node for node in fresh if growth.log_probs[node] >= _log(self.least)), self.nodes)
            if not level or graph.size >= self.nodes:
                break
        return graph.unrolled(self.nodes, depth)

    def _passes(self, growth: Growth, node: int) -> bool:
        """Whether the child is likely enough compared with its first sibling, the likeliest."""
        first = growth.log_probs[node - growth.ranks[node]]
        return growth.log_probs[node] >= first + _log(self.sibling_share)


class Graph:
    """The candidates as a graph: an edge to a node replaces a second node with the same tokens.

    Args:
        growth: the candidates.
        context: as in `Gsd`.
    """

    def __init__(self, growth: Growth, context: int):
        self.growth, self.context = growth, context
        self.size = 0
        self._edges: dict[int, list[int]] = {}
        self._known: dict[tuple[int, ...], int] = {}

    def take(self, node: int) -> bool:
        """Adds a candidate. If a known node is the same, only adds an edge to that node, and returns False."""
        growth, parent = self.growth, self.growth.parents[node]
        tokens, above = [growth.tokens[node]], parent
        while above != ROOT and len(tokens) <= self.context:
            tokens.append(growth.tokens[above])
            above = growth.parents[above]
        known = self._known.setdefault(tuple(tokens), node) if len(tokens) > self.context else node
        same = known != node and not self._leads_to(known, parent)
        self._edges.setdefault(parent, []).append(known if same else node)
        self.size += not same
        return not same

    def _leads_to(self, node: int, below: int) -> bool:
        """Whether `node` is on the path to `below`."""
        while below > node:
            below = self.growth.parents[below]
        return below == node

    def unrolled(self, most: int, depth: int) -> list[int]:
        """The likeliest nodes of the unrolled tree; a shared node is copied for each branch that leads to it."""
        growth, kept, order = self.growth, [], count()
        waiting = [(0.0, next(order), ROOT, ROOT)]  # (- log probability, order, node, its parent in the tree)
        while waiting and len(kept) <= most:
            _, _, node, above = heappop(waiting)
            place = node if node == ROOT or growth.parents[node] == above else growth.copy(node, above)
            kept.append(place)
            if place == ROOT or growth.depths[place] + 1 < depth:
                for child in self._edges.get(node, ()):
                    heappush(waiting, (-growth.path(place) - growth.log_probs[child], next(order), child, place))
        return kept[1:]


def _log(probability: float) -> float:
    return log(probability) if probability else -inf
