"""Lookahead: the target guesses several tokens ahead inside its own forward; the guesses become later drafts.

Lookahead decoding (Fu et al., arXiv 2402.02057): Jacobi iteration on a window of guessed tokens after the text yields
n-grams. Those that begin with the text's last token are drafted. It needs no model and no repetition. But the target
reads (W + G)(N - 1) tokens in each forward, so use it on accelerators with compute to spare.

The window is a branch of the draft like any other. The first token of each column is below the first token of the
column before it. The other tokens of a column are a chain below its first, as in the paper's mask. So a verifier may
even accept them. The window moves with the text, and new columns at its far end start from tokens of the prompt. If
another model reviews the draft, or the draft continues another drafter's, there is no window, and the pool has only
the prompt's n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Round
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.drafters._lookup import Lookup, Trie, until
from csdraft.tables.phrases import PhrasePool

__all__ = ["Lookahead"]

STRIDE = 2654435761
"""Spreads the first tokens of neighbouring columns over the prompt."""


@dataclass(frozen=True)
class Lookahead(Lookup):
    """Drafts n-grams from the target's earlier guesses, and a window in which it guesses further (see the module).

    Args:
        window: columns of guesses, the paper's W; 0 drafts from the prompt only.
        ngram: tokens of an n-gram, the paper's N.
        guesses: n-grams that are kept for each first token and drafted at once, the paper's G.
        prompt: whether the pool also has the n-grams of the prompt.
    """

    window: int = 7
    ngram: int = 5
    guesses: int = 7
    prompt: bool = True

    def __post_init__(self) -> None:
        check_range("a Lookahead", self, 0, window=MOST_BRANCHES)
        check_range("a Lookahead", self, 2, ngram=None)
        check_range("a Lookahead", self, 1, guesses=MOST_BRANCHES)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Where the last column of the window ends; n-grams are shorter."""
        return max(self.window + self.ngram - 2, self.ngram - 1)

    def width(self, depth: int) -> int:
        columns = max(min(self.window, depth - self.ngram + 2), 0)
        return columns * (self.ngram - 1) + self.guesses * min(depth, self.ngram - 1)

    def _state(self, context: Context) -> _Row:
        return context.call.memo((self, context.row), lambda: _Row(self, context.text.tokens))

    def evidence(self, context: Context) -> int:
        return int(bool(self._state(context).pool.after(context.text.tokens[-1], 1))) if len(context.text) else 0

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        last, ends = path[-1:] or context.text.tail(1), context.call.chooser.stopping.eos
        if not last or last[0] in ends:
            return context.draft
        row, trie = self._state(context), Trie()
        for phrase in row.pool.after(last[0], self.guesses):
            trie.add(until(ends, phrase[:depth]))
        if not (len(context.draft) or row.inner):
            row.offer(trie, context, budget.room)
        return context.draft.graft(trie.tokens, trie.parents, context.call.level(self))

    def observe(self, rounds: Sequence[Round]) -> None:
        for finished in rounds:
            row = self._state(finished.context)
            if row.offered:
                row.advance(finished)


@dataclass
class _Row:
    """A row's pool and window."""

    options: Lookahead
    prompt: list[int]
    inner: bool = False  # whether a model other than the target reviews the drafts
    columns: dict[int, list[int]] = field(default_factory=dict)  # start position -> guessed tokens from there on
    offered: list[int] = field(default_factory=list)  # start positions of the columns in the draft

    def __post_init__(self) -> None:
        self.pool = PhrasePool(self.options.ngram - 1, self.options.guesses)
        self.prompt = list(self.prompt)
        if self.options.prompt:
            self.pool.read(self.prompt)

    def offer(self, trie: Trie, context: Context, room: int) -> None:
        """Adds as many of the window's columns as there is room for."""
        self._slide(len(context.text))
        first, self.offered = ROOT, []
        for place, (start, column) in enumerate(self.columns.items()):
            if place + len(column) > room:
                break
            first = trie.add(column[:1], first)
            trie.add(column[1:], first)
            self.offered.append(start)

    def _slide(self, base: int) -> None:
        """Moves the window to `base`, the text's end: cuts columns, keeps the longest at a position, adds new ones."""
        old: dict[int, list[int]] = {}
        for start, column in self.columns.items():
            left, start = column[max(base - start, 0) :], max(start, base)
            if len(left) > len(old.get(start, ())):
                old[start] = left
        self.columns = {
            start: old.get(start) or [self.prompt[start * STRIDE % (1 << 32) % len(self.prompt)]]
            for start in range(base, base + self.options.window)
        }

    def advance(self, finished: Round) -> None:
        """One Jacobi step: each drafted column gets the target's next token, and a full column becomes an n-gram."""
        draft, likeliest = finished.draft, finished.scores.top(1)[:, 0].tolist()  # (nodes + 1,) first ROOT's
        first, moved = ROOT, {}
        for start in self.offered:
            column = self.columns[start]
            first = draft.child(first, column[0])
            if first is None:
                break
            end = first
            for token in column[1:]:
                end = None if end is None else draft.child(end, token)
            if end is not None:
                moved[start] = [*column, likeliest[end + 1]]
        self.inner = bool(self.offered) and not moved
        self.offered = []
        for start in moved:
            del self.columns[start]
        for start, column in moved.items():
            if len(column) == self.options.ngram:
                self.pool.add(column[0], tuple(column[1:]))
                del column[0]
                start += 1
            if len(column) > len(self.columns.get(start, ())):
                self.columns[start] = column
