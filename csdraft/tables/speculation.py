"""SuffixDecoding's speculation (arXiv 2411.04975): a suffix automaton proposes what followed most often.

The chance of a node is its parent's chance times count(node) / count(parent). A proposal is the most frequent path, or
the tree of the likeliest nodes, down to a least chance. Its score is the sum of its chances: the number of tokens that
are expected to be right.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from csdraft.tables.suffix_automaton import START, SuffixAutomaton

__all__ = ["NOTHING", "Rule", "Speculation"]

MOST_TRIED = 8
"""The most matches that are tried, each shorter than the last. The bound on the score nearly always stops earlier."""


@dataclass(frozen=True)
class Speculation:
    """A proposal.

    Attributes:
        tokens: (nodes,) parents first.
        parents: (nodes,) -1 for the children of the text; None for a chain.
        score: how many of its tokens are expected to be right.
    """

    tokens: list[int]
    parents: list[int] | None
    score: float


NOTHING = Speculation([], None, 0.0)


@dataclass(frozen=True)
class Rule:
    """How to speculate.

    Args:
        factor, offset: a match of n tokens allows factor * n + offset drafted tokens.
        min_prob: the least chance of a node.
        depth: the most levels.
        nodes: the most nodes of a tree; None: a chain, the most frequent path.
        stop: tokens that nothing follows, such as the end of a text.
    """

    factor: float
    offset: float
    min_prob: float
    depth: int
    nodes: int | None
    stop: Container[int]

    def best(self, automaton: SuffixAutomaton, state: int, matched: int) -> Speculation:
        """The proposal with the highest score, for the match or one of its shorter endings."""
        found, followed = NOTHING, automaton.continued(state)
        if followed != state:
            state, matched = followed, automaton.length[followed]
        for _ in range(MOST_TRIED):
            most = int(
                min(self.factor * matched + self.offset + 1e-6, self.depth if self.nodes is None else self.nodes)
            )
            if state == START or most <= found.score:  # a chance is at most 1
                break
            tried = self._path(automaton, state, most) if self.nodes is None else self._tree(automaton, state, most)
            if tried.score > found.score:
                found = tried
            state = automaton.link[state]
            matched = automaton.length[state]
        return found

    def _path(self, automaton: SuffixAutomaton, state: int, most: int) -> Speculation:
        tokens: list[int] = []
        chance, score, likeliest, continued = 1.0, 0.0, automaton.likeliest, automaton.continued
        while len(tokens) < most:
            state = continued(state)
            if state == START:  # the empty match: a token's overall frequency does not predict it
                break
            token, state, share = likeliest(state)
            chance *= share
            if share == 0 or chance < self.min_prob:
                break
            tokens.append(token)
            score += chance
            if token in self.stop:
                break
        return Speculation(tokens, None, score)

    def _tree(self, automaton: SuffixAutomaton, state: int, most: int) -> Speculation:
        """The `most` likeliest nodes. Parents are likelier than their children, so a best-first search finds them."""
        tokens: list[int] = []
        parents: list[int] = []
        waiting: list[tuple[float, int, int, int, int, int]] = []  # -chance, order, parent, depth, token, state
        score, order, deepest, least = 0.0, count(), self.depth, self.min_prob

        def expand(node: int, depth: int, chance: float, state: int) -> None:
            if depth < deepest and (state := automaton.continued(state)) != START:
                for share, token, target in automaton.transitions(state):
                    if chance * share >= least:
                        heappush(waiting, (-chance * share, next(order), node, depth + 1, token, target))

        expand(-1, 0, 1.0, state)
        while waiting and len(tokens) < most:
            chance, _, parent, depth, token, state = heappop(waiting)
            tokens.append(token)
            parents.append(parent)
            score -= chance
            if token not in self.stop:
                expand(len(tokens) - 1, depth, -chance, state)
        return Speculation(tokens, parents, score)
