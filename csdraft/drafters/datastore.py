"""Retrieval from a datastore: drafts what followed the text's last tokens in a large corpus, as a tree; no model.

REST (arXiv 2311.08252). Use it where the target writes what others have written before: code, standard phrases, or
with a large store of its own earlier outputs. Build the corpus with `scripts/build_datastore.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.decoding.limits import MOST_NODES, check_range, halvings
from csdraft.drafters._lookup import Lookup, check_vocabulary, match_evidence, until
from csdraft.tables.corpus import SPAN, CorpusIndex

__all__ = ["Datastore"]

MOST_MATCHES = 10_000
"""Twice as many as in the paper."""


@dataclass(frozen=True)
class Datastore(Lookup):
    """Finds the longest ending of the text in a corpus, and drafts the most frequent tokens that follow it there.

    All tokens are point masses. So the output stays exact; a rule that took frequencies for probabilities would be
    biased.

    Args:
        corpus: a `CorpusIndex`, or the path of one.
        depth: the most tokens in a row, unless a schedule or a cascade says otherwise.
        nodes: the most tokens of a draft: the most frequent ones, in a tie the nearest.
        min_match: the shortest match to draft from; no match is longer than 16.
        matches: how many places of a match are used, spread evenly over all of them. The paper uses 5000. With source
            code, 64 keeps 0.7 % more tokens than 32 and takes a third longer.
    """

    corpus: CorpusIndex | str | Path
    depth: int = 10  # type: ignore[assignment]
    nodes: int = 64
    min_match: int = 2
    matches: int = 32

    def __post_init__(self) -> None:
        check_range("a Datastore", self, depth=None, nodes=MOST_NODES, min_match=None, matches=MOST_MATCHES)
        self.load_option("corpus", CorpusIndex)

    @property
    def _corpus(self) -> CorpusIndex:
        assert isinstance(self.corpus, CorpusIndex)
        return self.corpus

    def check(self, call: Call) -> None:
        way_out = "build it with the target's tokenizer: scripts/build_datastore.py"
        check_vocabulary(call, "the datastore", self._corpus.largest, way_out)

    def width(self, depth: int) -> int:
        return self.nodes

    def sizes(self) -> Sequence[int]:
        return halvings(self.nodes)

    def evidence(self, context: Context) -> int:
        matched, _, _ = self._corpus.find(context.text.tail(SPAN), self.min_match)
        return match_evidence(matched)

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        _, first, last = self._corpus.find(context.text.tail(SPAN) + path, self.min_match)
        if first == last:
            return context.draft
        ends = context.call.chooser.stopping.eos
        ahead = [until(ends, tokens) for tokens in self._corpus.continuations(first, last, depth, self.matches)]
        tokens, parents = _merged(ahead, min(budget.size or self.nodes, self.nodes))
        return context.draft.graft(tokens, parents, context.call.level(self))


def _merged(sequences: Sequence[Sequence[int]], nodes: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of the `nodes` most frequent nodes of the sequences' trie; in a tie the nearest first."""
    tokens: list[int] = []
    parents: list[int] = []
    # (-count, depth, order, parent, sequences that go through the node)
    waiting: list[tuple[int, int, int, int, Sequence[Sequence[int]]]] = []
    order, node, depth, through = 0, -1, 0, sequences
    while True:
        by_token: dict[int, list[Sequence[int]]] = {}
        for sequence in through:
            if depth < len(sequence):
                by_token.setdefault(sequence[depth], []).append(sequence)
        for same in by_token.values():
            order += 1
            heappush(waiting, (-len(same), depth, order, node, same))
        if len(tokens) == nodes or not waiting or waiting[0][0] == -1:  # the other nodes have one sequence each
            break
        _, depth, _, parent, through = heappop(waiting)
        node = len(tokens)
        tokens.append(through[0][depth])
        parents.append(parent)
        depth += 1
    starting: dict[int, list[tuple[int, Sequence[int]]]] = {}
    for _, depth, _, parent, same in sorted(waiting):
        starting.setdefault(depth, []).append((parent, same[0]))
    depth, alone = 0, []
    while alone or starting:
        level, alone = starting.pop(depth, []) + alone, []
        for parent, sequence in level[: nodes - len(tokens)]:
            if depth + 1 < len(sequence):
                alone.append((len(tokens), sequence))
            tokens.append(sequence[depth])
            parents.append(parent)
        depth += 1
    return tokens, parents
