"""A tree of the likeliest tokens, found without a model.

Its tokens are copies from the text and from earlier outputs, and the remembered successors of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from heapq import heappop, heappush

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context
from csdraft.drafters._history import history
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.outputs import OutputTable, Place
from csdraft.tables.rates import Copy, SourceRates
from csdraft.tables.suffix_automaton import MOST_LINKS, START, SuffixAutomaton

__all__ = ["LikeliestTree"]

Match = tuple[SuffixAutomaton, int, int]
"""(automaton, state, length) of the longest ending of a text that the automaton knows."""


class LikeliestTree:
    """The tree that follows one row's text, grown node by node, the likeliest node first.

    A tree of n nodes is the first n nodes of any larger one, so a schedule can compare several sizes at the cost of
    the largest. Below each node, the token that a copy continues with gets the chance measured for its kind of copy;
    the rest of the chance is shared among the remembered successors of the node's token.

    Args:
        context: where the tree begins.
        matrix: the remembered successors.
        outputs: the earlier outputs; None: none are searched.
        place: how far the row's text was matched with the earlier outputs.
        rates: how often each kind of guess was right.

    Attributes:
        tokens, parents, depths: (nodes,) so far.
        chances: (nodes,) the chance that the whole path to the node is right.
    """

    def __init__(
        self, context: Context, matrix: AdjacencyTable, outputs: OutputTable | None, place: Place, rates: SourceRates
    ):
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.chances: list[float] = []
        self._matrix, self._rates = matrix, rates
        self._ends = context.call.chooser.stopping.eos
        self._lock = nullcontext() if outputs is None else outputs.lock  # another thread may add an output
        self._guesses: dict[int, tuple[Copy | None, int, list[int]]] = {}  # node -> kind of copy, token, successors
        self._waiting: list[tuple[float, int, int, int, list[Match]]] = []  # -chance, order, parent, token, matches
        path = context.path
        last = path[-1] if path else next(iter(context.text.tail(1)), None)
        if last is None or last in self._ends:
            return
        known = history(context)
        matches = [(known.automaton, *known.find(path))]
        if outputs is not None:
            matches += outputs.matches(context.text.tokens, path, place)
        with self._lock:
            self._expand(ROOT, last, 1.0, matches)

    def grow(self, nodes: int) -> None:
        """Grows the tree to `nodes` nodes, or as many as are known."""
        waiting = self._waiting
        if not waiting or len(self.tokens) >= nodes:
            return
        with self._lock:
            while waiting and len(self.tokens) < nodes:
                chance, _, parent, token, matches = heappop(waiting)
                node = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(0 if parent == ROOT else self.depths[parent] + 1)
                self.chances.append(-chance)
                if token not in self._ends:
                    self._expand(node, token, -chance, [_moved(match, token) for match in matches])

    def _expand(self, node: int, token: int, chance: float, matches: list[Match]) -> None:
        """Adds the children that a node may have to the waiting candidates."""
        waiting, rates, order = self._waiting, self._rates, len(self.tokens)
        successors = self._matrix.successors[token].tolist() if self._matrix.known(token) else []
        kind, copied, best = None, ROOT, 0.0
        for place, match in enumerate(matches):
            found, matched = _next(match)
            if matched:
                tried = Copy.of(found, place > 0, matched, successors)
                if (share := rates.chance(tried)) > best:
                    kind, copied, best = tried, found, share
        self._guesses[node] = kind, copied, successors
        if kind is not None:
            heappush(waiting, (-chance * best, order, node, copied, matches))
        left = chance * (1 - best)
        for share, other in zip(rates.ranks, successors, strict=False):
            if other != copied:
                heappush(waiting, (-left * share, order, node, other, matches))

    def draft(self, context: Context, depth: int, nodes: int, level: int) -> Draft:
        """The context's draft with the first `nodes` nodes of the tree, but at most `depth` levels."""
        kept = [node for node in range(min(nodes, len(self.tokens))) if self.depths[node] < depth]
        places = {ROOT: ROOT} | {node: place for place, node in enumerate(kept)}
        tokens, parents = [self.tokens[node] for node in kept], [places[self.parents[node]] for node in kept]
        return context.draft.graft(tokens, parents, level)

    def learn(self, tokens: Sequence[int]) -> None:
        """Counts which guesses were right, drafted or not. The target wrote `tokens` where the tree begins."""
        children = {key: node for node, key in enumerate(zip(self.parents, self.tokens, strict=True))}
        node: int | None = ROOT
        for token in tokens:
            if node is None or node not in self._guesses:
                return
            self._rates.learn(token, *self._guesses[node])
            node = children.get((node, token))


def _next(match: Match) -> tuple[int, int]:
    """The token that follows a match most often, and the match's length; length 0 if no token follows."""
    automaton, state, matched = match
    followed = automaton.continued(state)
    if followed == START:
        return ROOT, 0
    token, _, share = automaton.likeliest(followed)
    return token, (matched if followed == state else automaton.length[followed]) if share else 0


def _moved(match: Match, token: int) -> Match:
    """The match after one more token."""
    automaton, state, matched = match
    state, matched = automaton.walk(state, matched, (token,), MOST_LINKS) or (START, 0)
    return automaton, state, matched
