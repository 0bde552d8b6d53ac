"""Reference: copies from documents that the output is likely to quote, after a match of the last tokens; no model.

LLMA, "Inference with Reference" (arXiv 2304.04487). Use it for retrieval, caches of earlier answers, or edits of a
document that is not in the prompt; `max_gram` copies from the prompt. Unlike the paper it takes the longest match, not
any match of a fixed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.decoding.limits import check_range
from csdraft.drafters._lookup import Lookup, check_vocabulary, match_evidence
from csdraft.tables.documents import DocumentTable
from csdraft.tables.suffix_automaton import START

__all__ = ["Reference"]

NEAR = 32
"""How many of the prompt's last tokens a match may include."""


@dataclass(frozen=True, eq=False)
class Reference(Lookup):
    """Finds the longest ending of text and draft in the documents, and copies what follows it, within its document.

    Args:
        documents: the token ids of each document, a `DocumentTable` (its `encode` takes texts), or the path of one.
        depth: tokens per round, unless a schedule or a cascade says otherwise; the paper's k.
        min_match: the shortest match to copy from; the paper's n.
    """

    documents: DocumentTable | Sequence[Sequence[int]] | str | Path
    depth: int = 20  # type: ignore[assignment]
    min_match: int = 1

    def __post_init__(self) -> None:
        check_range("a Reference", self, depth=None, min_match=None)
        if not isinstance(self.documents, DocumentTable | str | Path):
            object.__setattr__(self, "documents", DocumentTable(self.documents))
        self.load_option("documents", DocumentTable)

    @property
    def _documents(self) -> DocumentTable:
        assert isinstance(self.documents, DocumentTable)
        return self.documents

    def check(self, call: Call) -> None:
        way_out = "encode the documents with the target's tokenizer"
        check_vocabulary(call, "the table of documents", self._documents.largest, way_out)

    def evidence(self, context: Context) -> int:
        return match_evidence(self._cursor(context).matched, self.min_match)

    def _cursor(self, context: Context) -> _Cursor:
        """The match of the row's text in the documents, up to date."""
        text = context.text
        cursor: _Cursor = context.call.memo((self, context.row), lambda: _Cursor(max(len(text) - NEAR, 0)))
        if cursor.read < len(text):
            automaton, new = self._documents.automaton, text.tokens[cursor.read :]
            cursor.state, cursor.matched = automaton.advance(cursor.state, cursor.matched, new)
            cursor.read = len(text)
        return cursor

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        cursor, automaton = self._cursor(context), self._documents.automaton
        state, matched = automaton.advance(cursor.state, cursor.matched, path)
        if matched < self.min_match:
            return context.draft
        return self.chain(context, self._documents.after(automaton.recent[state], depth))


@dataclass
class _Cursor:
    """The longest ending of the tokens read so far that is found in the documents."""

    read: int
    state: int = START
    matched: int = 0
