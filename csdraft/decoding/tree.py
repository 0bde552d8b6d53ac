"""Tree drafting: a model drafts a tree of tokens for every row, with one forward per step.

In each step every row's `Tree` names the nodes that it wants to expand. The model reads them all in one forward of the
batch. The children of a node are the likeliest tokens after it, or tokens drawn from the model's distribution. At the
end the tree returns the candidates that make up the draft. It may leave out any chosen candidate, since those are
point masses. `Tree.draws` says which drawn candidates it may leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from csdraft.decoding.children import Children, find_children
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context, Request, Step, Tree
from csdraft.decoding.session import Session

__all__ = ["Growth", "draft_tree"]


@dataclass(eq=False)
class Growth:
    """The candidates of one row's tree so far, numbered in the order they were found, parents before children.

    Attributes:
        tokens, parents: (nodes,) as in a `Draft`; `ROOT` is the place where the draft begins.
        log_probs: (nodes,) the model's log probability of each token after its parent. Under coupled draws it is
            log softmax(scores - log E), E the position's noise: the chance that the reviewer chooses the token if its
            scores differ from the model's by Gumbel errors.
        paths: (nodes,) sums of `log_probs` from the root: the log of the chance that the branch is kept down to here.
        depths: (nodes,) 0 for the root's children.
        ranks: (nodes,) 0 for the first child of its parent.
        perturbed: (nodes,) log_probs + Gumbel noise, in draw order; empty unless siblings are drawn without
            replacement.
        latest: the nodes that the last step added.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    paths: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    perturbed: list[float] = field(default_factory=list)
    latest: range = range(0)
    confidence: list[float] = field(default_factory=list)
    draft_probs: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, node: int) -> float:
        """Log probability of the branch down to `node`; 0 for `ROOT`."""
        return 0.0 if node == ROOT else self.paths[node]

    def best(self, nodes: Iterable[int], most: int) -> list[int]:
        """The `most` nodes with the likeliest paths, in order of number; ties go to the earlier node.

        A node is at most as likely as its parent, so the best of all candidates include their parents.
        """
        return sorted(sorted(nodes, key=lambda node: (-self.paths[node], node))[:most])

    def add(self, parents: Sequence[int], children: Sequence[Children]) -> None:
        """Adds the children that one step found: `children[i]` below node `parents[i]`."""
        before = len(self)
        for parent, own in zip(parents, children, strict=True):
            above, depth, count = self.path(parent), 0 if parent == ROOT else self.depths[parent] + 1, len(own.tokens)
            self.tokens += own.tokens
            self.parents += [parent] * count
            self.log_probs += own.log_probs
            self.paths += [above + value for value in own.log_probs]
            self.depths += [depth] * count
            self.ranks += range(count)
            self.perturbed += own.perturbed
            self.confidence += own.confidence
            self.draft_probs += [own.probs] * count
        self.latest = range(before, len(self))

    def copy(self, node: int, parent: int) -> int:
        """Adds a candidate with the token of `node` below another parent, though the model has not scored it there.

        For trees with `draws` None only. The copy can be kept, but not expanded.
        """
        confidence = self.confidence[node : node + 1]  # none if there is none
        self.add([parent], [Children([self.tokens[node]], [self.log_probs[node]], [], confidence)])
        return len(self) - 1


class Row:
    """One row's tree while it is drafted. The model reads only the candidates that are expanded."""

    def __init__(self, context: Context, tree: Tree, depth: int):
        self.context, self.tree, self.growth = context, tree, Growth()
        self.steps = tree.grow(self.growth, depth)
        self.read = context.draft.main_branch  # then the candidates that were expanded
        self.places = {ROOT: self.read.tip}  # candidate -> node of `read`
        self.step = Step((), 0)
        self.asked: Sequence[int] = ()  # candidates that this step expands
        self.kept: Sequence[int] = ()  # candidates that the finished tree returned


def draft_tree(
    session: Session,
    tree: Tree,
    contexts: Sequence[Context],
    depths: Sequence[int],
    level: int,
    confidence: bool = False,
) -> list[Draft]:
    """Drafts a tree of at most `depths[i]` levels below the tip of each context i.

    Args:
        level: the model's level number.
        confidence: whether the tokens' softmax probabilities will be read by a reviewer above.

    Returns:
        One draft for each context, the context's own nodes first.

    Raises:
        ValueError: the tree asked for, or returned, something that `Tree` forbids.
    """
    rows = [Row(context, tree, depth) for context, depth in zip(contexts, depths, strict=True)]
    live = [row for row, depth in zip(rows, depths, strict=True) if depth > 0 and _next(row, session)]
    while live:
        requests = []
        for row in live:
            _read(row, level)
            after = [row.places[node] for node in row.asked]
            requests.append(Request(row.context.row, row.context.text, row.read, after))
        views, steps = session.score(requests, choose=False), [row.step for row in live]
        above = [list(map(row.growth.path, row.asked)) for row in live]
        for row, found in zip(live, find_children(views, steps, above, tree.draws, confidence), strict=True):
            row.growth.add(row.asked, found)
        live = [row for row in live if _next(row, session)]
    return [_draft(row, level, confidence) for row in rows]


def _next(row: Row, session: Session) -> bool:
    """Gets the row's next step; False if its tree is finished. Tokens that end the text are never expanded."""
    ends = session.chooser.stopping.eos
    try:
        while True:
            row.step = next(row.steps)
            row.asked = [
                node for node in sorted(row.step.nodes) if node == ROOT or row.growth.tokens[node] not in ends
            ]
            if row.asked:
                return True
            row.growth.latest = range(len(row.growth), len(row.growth))
    except StopIteration as end:
        row.kept = end.value
        return False


def _read(row: Row, level: int) -> None:
    """Adds the candidates that this step expands to the draft that the model reads."""
    growth, places = row.growth, row.places
    new = [node for node in row.asked if node != ROOT]
    for i, node in enumerate(new):
        if node in places:
            raise ValueError(f"a tree asked twice for the children of node {node}; a node is expanded once")
        places[node] = len(row.read) + i
    row.read = row.read.attach([growth.tokens[n] for n in new], [places[growth.parents[n]] for n in new], level)


def _draft(row: Row, level: int, confidence: bool) -> Draft:
    """The context's own nodes, then the candidates that the tree keeps."""
    growth, context, nodes = row.growth, row.context, sorted(row.kept)
    drawn = any(probs is not None for probs in growth.draft_probs)
    if drawn:
        _check_drawn(growth, nodes, row.tree)
    places = {ROOT: context.tip} | {n: len(context.draft) + i for i, n in enumerate(nodes)}  # candidate -> draft node
    if missing := [node for node in nodes if growth.parents[node] not in places]:
        raise ValueError(f"a tree kept nodes {missing} without their parents")
    pick = lambda values: [values[node] for node in nodes]  # noqa: E731 - three uses on three lines
    return context.draft.attach(
        pick(growth.tokens),
        [places[growth.parents[node]] for node in nodes],
        level,
        pick(growth.confidence) if confidence else None,
        pick(growth.draft_probs) if drawn else None,
        row.tree.draws or "iid",
    )


def _check_drawn(growth: Growth, nodes: list[int], tree: Tree) -> None:
    """Raises ValueError if a drawn node is kept without the sibling drawn before it: that would bias sampling."""
    kept = set(nodes)
    for node in nodes:
        if growth.ranks[node] and node - 1 not in kept:
            raise ValueError(
                f"{type(tree).__name__} kept child {growth.ranks[node]} of node {growth.parents[node]} and not the "
                f"one drawn before it; of children drawn as {tree.draws!r} keep the first few, or set draws = None"
            )
