"""Prompt lookup: copies what followed the first earlier occurrence of the text's last few tokens; no model.

Prompt lookup decoding (Saxena, 2023), exactly as transformers' `prompt_lookup_num_tokens` does it. Use it to compare
with transformers, or to keep a known setting. `max_gram` finds longer and more recent matches at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.decoding.limits import check_range
from csdraft.decoding.text import Text

__all__ = ["PromptLookup"]

MOST_NGRAM = 64
"""Every n-gram of the text up to this length is stored; `max_gram` finds matches of any length without that."""


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Looks up the last `max_ngram` tokens, then fewer and fewer; takes the first (oldest) match with a next token.

    It copies up to the end of the text and no further, and stops before an end-of-text token.

    Args:
        depth: tokens per round, unless a schedule or a cascade says otherwise: transformers'
            `prompt_lookup_num_tokens`.
        max_ngram: the longest match that is tried; transformers' `max_matching_ngram_size`.
    """

    depth: int = 10  # type: ignore[assignment]
    max_ngram: int = 2

    def __post_init__(self) -> None:
        check_range("a PromptLookup", self, depth=None, max_ngram=MOST_NGRAM)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._propose(c, min(b.depth, b.room)) for c, b in zip(contexts, budgets, strict=True)]

    def _propose(self, context: Context, depth: int) -> Draft:
        call, text, path = context.call, context.text, context.path
        if depth <= 0:
            return context.draft
        index: _Index = call.memo((_Index, self.max_ngram, context.row), lambda: _Index(self.max_ngram))
        index.read(text)
        start = index.find(text, path)
        if start is None:
            return context.draft
        tokens = text.tokens[start : start + depth]
        if len(tokens) < depth:
            tokens += path[max(0, start - len(text)) :][: depth - len(tokens)]
        eos = call.chooser.stopping.eos
        if not eos.isdisjoint(tokens):
            tokens = tokens[: next(i for i, token in enumerate(tokens) if token in eos)]
        return context.draft.extend(tokens, call.level(self))


@dataclass
class _Index:
    """The position after the first occurrence of each n-gram of a text; a search costs one lookup for each n."""

    max_ngram: int
    read_tokens: int = 0
    first: dict[tuple[int, ...], int] = field(default_factory=dict)

    def read(self, text: Text) -> None:
        """Reads the tokens that were committed since last time."""
        if self.read_tokens < len(text):
            _note(self.first, text.tokens, self.read_tokens, self.max_ngram)
            self.read_tokens = len(text)

    def find(self, text: Text, path: list[int]) -> int | None:
        """The position after the first match of the longest n-gram that has a match; None if no n-gram has one."""
        tail = text.tail(self.max_ngram) + path
        end, offset = len(text) + len(path), len(text) + len(path) - len(tail)
        fresh: dict[tuple[int, ...], int] = {}
        if path:
            _note(fresh, tail, len(tail) - len(path), self.max_ngram)
        for size in range(min(self.max_ngram, len(tail)), 0, -1):
            gram = tuple(tail[-size:])
            start = self.first.get(gram)
            if start is None and gram in fresh:
                start = offset + fresh[gram]
            if start is not None and start < end:
                return start
        return None


def _note(first: dict[tuple[int, ...], int], tokens: list[int], start: int, max_ngram: int) -> None:
    """Adds to `first` the n-grams of `tokens` that end at `start` or later."""
    for end in range(start + 1, len(tokens) + 1):
        for size in range(1, min(max_ngram, end) + 1):
            first.setdefault(tuple(tokens[end - size : end]), end)
