"""Lookahead: the target guesses ahead in parallel inside its own forward, and its guesses are the later drafts.

Lookahead decoding (Fu et al., arXiv 2402.02057): Jacobi iteration on a window of guessed tokens behind the text yields
n-grams; those that begin with the last token are drafted. No model and no repetition is needed, but forwards become
wide, (W + G)(N - 1) tokens: for accelerators with compute to spare.

The window is a branch of the draft like any other: of every column the first token stands below the first token of
the column before, the rest below one another, as the paper's mask has it. So any verifier may even accept it. The
window moves with the text by as many places as were committed, and columns grow anew from tokens of the prompt at its
far end. Where another model reviews the draft, or the draft goes on from another drafter's, there is no window, and
the pool has the prompt's n-grams only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.drafters._copying import until
from csdraft.drafters._trie import Trie
from csdraft.tables.phrases import PhrasePool

__all__ = ["Lookahead"]

STRIDE = 2654435761
"""Picks tokens of the prompt that do not stand side by side there."""


@dataclass(frozen=True)
class Lookahead(Drafter):
    """Drafts the n-grams that the target's own guesses left behind, and has it guess on (see the module).

    Args:
        window: columns of guesses, the paper's W; 0 drafts from the prompt only.
        ngram: tokens of an n-gram, the paper's N.
        guesses: n-grams kept for a first token, and drafted at once, the paper's G.
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
        """The last column of the window ends so deep; n-grams are shorter."""
        return max(self.window + self.ngram - 2, self.ngram - 1)

    def width(self, depth: int) -> int:
        columns = max(min(self.window, depth - self.ngram + 2), 0)
        return columns * (self.ngram - 1) + self.guesses * min(depth, self.ngram - 1)

    def _state(self, context: Context) -> _Row:
        return context.call.memo((self, context.row), lambda: _Row(self, context.text.tokens))

    def evidence(self, context: Context) -> int:
        return int(bool(self._state(context).pool.after(context.text.tokens[-1], 1))) if len(context.text) else 0

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._propose(c, min(b.depth, b.room), b.room) for c, b in zip(contexts, budgets, strict=True)]

    def _propose(self, context: Context, depth: int, room: int) -> Draft:
        last = context.path[-1:] or context.text.tail(1)
        eos = context.call.chooser.stopping.eos
        if depth <= 0 or not last or last[0] in eos:
            return context.draft
        row, trie = self._state(context), Trie()
        best = ROOT
        if not (len(context.draft) or row.inner):
            best = row.offer(trie, context, room)
        for phrase in reversed(row.pool.after(last[0], self.guesses)):
            best = trie.add(until(eos, phrase[:depth]))
        return trie.below(context, best, context.call.level(self))

    def observe(self, rounds: Sequence[Round]) -> None:
        for finished in rounds:
            row = self._state(finished.context)
            if row.offered:
                row.advance(finished)


@dataclass
class _Row:
    """A row's pool and window. A column is a guessed text from its start, a position, on."""

    options: Lookahead
    prompt: list[int]
    inner: bool = False  # somebody else reviews what is drafted
    columns: dict[int, list[int]] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)  # the starts of the columns in the draft

    def __post_init__(self) -> None:
        self.pool = PhrasePool(self.options.ngram - 1, self.options.guesses)
        self.prompt = list(self.prompt)
        if self.options.prompt:
            self.pool.read(self.prompt)

    def offer(self, trie: Trie, context: Context, room: int) -> int:
        """Puts the window behind the text, as far as there is room; the end of its first column."""
        self._slide(len(context.text))
        first, best = ROOT, ROOT
        self.offered = []
        for place, (start, column) in enumerate(self.columns.items()):
            if place + len(column) > room:
                break
            first = trie.add(column[:1], first)
            end = trie.add(column[1:], first)
            best = best if place else end
            self.offered.append(start)
        return best

    def _slide(self, base: int) -> None:
        """Columns from `base` on, where the text now ends: of two at one place the longer, a new one where none is."""
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
        """One Jacobi step: every offered column gets the target's token after its last; a full one is an n-gram."""
        draft, likeliest = finished.draft, finished.scores.top(1)[:, 0].tolist()
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
