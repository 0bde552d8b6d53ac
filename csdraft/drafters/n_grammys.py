"""N-Grammys: several guesses at once, from n-grams of the text and from the target's choices after a single token.

The N-Grammys (Stewart et al., arXiv 2411.03786) draft k continuations of w tokens. The first ones followed the last
token earlier in the text. The others come from a table of the target's likeliest next tokens. Use it with targets that
read k * w tokens nearly as fast as one. The paper verifies k rows; here they form one tree.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.drafters._lookup import Lookup, Trie, check_vocabulary, until
from csdraft.tables.successors import SuccessorTable

__all__ = ["NGrammys"]


@dataclass(frozen=True)
class NGrammys(Lookup):
    """Drafts what followed the text's last tokens most often (in a tie the latest), then what the table says.

    Args:
        depth: tokens of a continuation, the paper's w.
        rows: number of continuations, the paper's k.
        match: tokens that must match in the text, the paper's q; the paper finds 1 best.
        table: the target's `SuccessorTable`, or the path of a saved one; None: n-grams of the text only.
    """

    depth: int = 10  # type: ignore[assignment]
    rows: int = 10
    match: int = 1
    table: SuccessorTable | str | Path | None = None

    def __post_init__(self) -> None:
        check_range("an NGrammys", self, depth=None, rows=MOST_BRANCHES, match=None)
        self.load_option("table", SuccessorTable)

    def width(self, depth: int) -> int:
        return self.rows * depth

    def check(self, call: Call) -> None:
        if isinstance(self.table, SuccessorTable):
            way_out = "build it from the target: scripts/build_bigrams.py --model"
            check_vocabulary(call, "the successor table", len(self.table) - 1, way_out)

    def _continuations(self, context: Context) -> _Continuations:
        """The row's continuations, up to date; drafters of one cascade with the same lengths share them."""
        key = (_Continuations, self.match, self.depth, context.row)
        known: _Continuations = context.call.memo(key, lambda: _Continuations(self.match, self.depth))
        known.read(context.text.tokens)
        return known

    def evidence(self, context: Context) -> int:
        return min(self._continuations(context).times(context.text.tail(self.match)), 2)

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        ends, depth = context.call.chooser.stopping.eos, min(depth, self.depth)
        tail = (context.text.tail(self.match) + path)[-self.match :]
        if not tail or tail[-1] in ends:
            return context.draft
        rows = self._continuations(context).after(tail, self.rows, depth)
        if isinstance(self.table, SuccessorTable) and len(rows) < self.rows and tail[-1] < len(self.table):
            rows += self.table.after(tail[-1], self.rows - len(rows), depth)
        trie = Trie()
        for row in rows:
            trie.add(until(ends, row))
        return context.draft.graft(trie.tokens, trie.parents, context.call.level(self))


class _Continuations:
    """What followed each n-gram of a text, how often, and where last. A lookup takes as long in any text.

    Args:
        match: tokens of an n-gram.
        length: tokens of a continuation.
    """

    def __init__(self, match: int, length: int):
        self.match, self.length = match, length
        self.tokens: list[int] = []
        self.taken = 0
        self.entries: dict[int, tuple[int, int]] = {}  # hash of n-gram and continuation -> its entry in `ranked`
        self.ranked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        """N-gram -> sorted (-count, -start) of its continuations; `start` is where the latest occurrence begins."""

    def read(self, tokens: list[int]) -> None:
        """Reads the tokens that were committed since last time."""
        self.tokens = tokens
        for end in range(max(self.taken, self.match + self.length - 1) + 1, len(tokens) + 1):
            start = end - self.length
            gram = tuple(tokens[start - self.match : start])
            key = hash((gram, *tokens[start:end]))
            ranked = self.ranked.setdefault(gram, [])
            old = self.entries.get(key)
            if old is not None:
                del ranked[bisect_left(ranked, old)]
            entry = self.entries[key] = ((old[0] if old else 0) - 1, -start)
            insort(ranked, entry)
        self.taken = len(tokens)

    def times(self, tail: list[int]) -> int:
        """How often the most frequent continuation of `tail` followed it."""
        ranked = self.ranked.get(tuple(tail))
        return -ranked[0][0] if ranked else 0

    def after(self, tail: list[int], rows: int, depth: int) -> list[list[int]]:
        """At most `rows` continuations of `tail`, best first, each of at most `depth` tokens and inside the text."""
        tokens, match = self.tokens, self.match
        found = self.ranked.get(tuple(tail), [])[:rows]
        last = len(tokens) - 1
        for start in range(last, max(last - self.length + 1, match - 1), -1):
            if tokens[start - 1] == tail[-1] and tokens[start - match : start] == tail:
                found.append((-1, -start))
        found.sort()
        return [tokens[-start : depth - start] for _, start in found[:rows]]
