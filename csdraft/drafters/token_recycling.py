"""Token Recycling: drafts the tokens that the target found likeliest when it last read each token; no model.

Token Recycling (Luo et al., arXiv 2408.08696): a matrix holds the eight likeliest successors of every token. It is
updated from the logits of every scored node, and unrolled into a fixed tree. It works with any text and any target;
unlike copying it needs no repetition. Use it where a wide forward is nearly free (a GPU, small batches). On a CPU take
few `nodes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Round
from csdraft.decoding.limits import check_range, halvings
from csdraft.drafters._lookup import Lookup
from csdraft.tables.adjacency import KEPT, AdjacencyTable

__all__ = ["TokenRecycling"]

CHILDREN: tuple[tuple[int, ...], ...] = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)
"""The paper's tree: for each layer, the number of children of each node, likeliest node first."""
NODES = sum(map(sum, CHILDREN))


@dataclass(frozen=True)
class TokenRecycling(Lookup):
    """Unrolls the target's adjacency matrix from the last token, breadth first, into the paper's tree.

    Args:
        depth: layers of the tree, at most 6.
        nodes: tokens of the tree, at most 80. With fewer, the nodes of the paper's tree with the best ranks are kept.
        remember: whether the matrix outlives the call. Drafts, but never the text, then depend on earlier calls.
        table: the matrix, or the path of a saved one. It is updated if `remember`, else each call starts from a copy.
            None: one for each target if `remember`, kept as long as the target, else an empty one for each call.
    """

    depth: int = len(CHILDREN)  # type: ignore[assignment]
    nodes: int = NODES
    remember: bool = True
    table: AdjacencyTable | str | Path | None = None

    def __post_init__(self) -> None:
        check_range("a TokenRecycling", self, depth=len(CHILDREN), nodes=NODES)
        self.load_option("table", AdjacencyTable)

    def width(self, depth: int) -> int:
        return template(self.nodes, min(depth, self.depth)).layers[-1][1] - 1 if depth > 0 else 0

    def sizes(self) -> Sequence[int]:
        return halvings(self.nodes)

    def check(self, call: Call) -> None:
        if call.vocab < KEPT:
            raise ValueError(f"the target has {call.vocab} tokens; TokenRecycling needs {KEPT} or more")
        if isinstance(self.table, AdjacencyTable):
            if len(self.table) != call.vocab:
                raise ValueError(f"the adjacency table has {len(self.table)} tokens, the target {call.vocab}")
            if self.remember:
                self.table.claim(call.target)

    def matrix(self, call: Call) -> AdjacencyTable:
        """The matrix that it unrolls: its own, the target's, or the call's."""
        table: Any = self.table
        if self.remember:
            return table or call.memo(AdjacencyTable, lambda: AdjacencyTable.of(call.target, call.vocab))
        return call.memo((self, AdjacencyTable), lambda: table.copy() if table else AdjacencyTable(call.vocab))

    def evidence(self, context: Context) -> int:
        return int(len(context.text) > 0 and self.matrix(context.call).known(context.text.tokens[-1]))

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        last, matrix = path[-1:] or context.text.tail(1), self.matrix(context.call)
        if not last or last[0] in context.call.chooser.stopping.eos or not matrix.known(last[0]):
            return context.draft
        tree = template(min(budget.size or self.nodes, self.nodes), min(depth, self.depth))
        tokens = np.empty(len(tree.parents) + 1, np.int64)  # (nodes + 1,) first the root
        tokens[0] = last[0]
        for start, end, above, ranks in tree.layers:
            tokens[start:end] = matrix.follow(tokens[above], ranks)
        new, parents = tokens[1:].tolist(), tree.parents
        if min(new) < 0:  # the matrix knows either all successors of a token or none
            known = [node for node, token in enumerate(new) if token >= 0]
            number = {node: i for i, node in enumerate(known)} | {-1: -1}
            new, parents = [new[node] for node in known], [number[parents[node]] for node in known]
        return context.draft.graft(new, parents, context.call.level(self))

    def observe(self, rounds: Sequence[Round]) -> None:
        matrix = self.matrix(rounds[0].context.call)
        eos = rounds[0].context.call.chooser.stopping.eos
        tokens, found = [], []
        for finished in rounds:
            text = finished.context.text.tokens
            seen = [text[-1] if text else UNSEEN, *finished.draft.tokens]
            # Accepted nodes come last, so that a token that occurs several times gets its entry from the text.
            order = [*range(len(seen)), 0, *(node + 1 for node in finished.verdict.accepted)]
            order = [at for at in order if seen[at] not in eos and seen[at] != UNSEEN]
            tokens += [seen[at] for at in order]
            found.append(finished.scores.top(KEPT).numpy()[order])  # (len(order), KEPT)
        matrix.update(np.array(tokens, np.int64), np.concatenate(found))


UNSEEN = -1


class Template(NamedTuple):
    """A tree without tokens.

    Attributes:
        parents: (nodes,) as in a `Draft`.
        layers: (first, end, parents, ranks) of each layer: its nodes are first to end - 1, with the root as node 0;
            then the parent and the rank of each of its nodes.
    """

    parents: tuple[int, ...]
    layers: tuple[tuple[int, int, np.ndarray, np.ndarray], ...]


@lru_cache(maxsize=64)
def template(nodes: int, depth: int) -> Template:
    """The best `nodes` nodes of the paper's tree, if a token of rank r is right with chance 1 / (2 + 2r)."""
    layer: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for counts in CHILDREN:
        layer = [(*path, rank) for path, count in zip(layer, counts, strict=True) for rank in range(count)]
        paths += layer
    odds = {path: float(np.prod([2.0 + 2 * rank for rank in path])) for path in paths}
    kept = [path for path in sorted(paths, key=odds.__getitem__)[:nodes] if len(path) <= depth]
    kept.sort(key=lambda path: (len(path), odds[path]))
    number = {(): 0} | {path: i + 1 for i, path in enumerate(kept)}
    layers = []
    for size in range(1, max(map(len, kept)) + 1):
        paths = [path for path in kept if len(path) == size]
        above = np.array([number[path[:-1]] for path in paths])  # (nodes of the layer,)
        ranks = np.array([path[-1] for path in paths])
        layers.append((number[paths[0]], number[paths[-1]] + 1, above, ranks))
    return Template(tuple(number[path[:-1]] - 1 for path in kept), tuple(layers))
