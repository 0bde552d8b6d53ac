"""A searchable index of one row's text, shared by all drafters that search it."""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Context
from csdraft.decoding.text import Text
from csdraft.tables.suffix_automaton import JUNCTION, MOST_LINKS, START, SuffixAutomaton

__all__ = ["NEAR", "History", "history"]

NEAR = 16


class History:
    """A row's committed text with its automaton, after the encoder's input if there is one.

    Args:
        source: the encoder's input. The automaton reads a junction instead of its last token, so no match spans both
            the input and the text. That last token can still be copied, and no match needs it since nothing follows.
    """

    def __init__(self, source: Sequence[int] = ()):
        self.source = len(source)
        self.tokens = list(source)
        self.automaton = SuffixAutomaton()
        if source:
            self.automaton.extend([*source[:-1], JUNCTION])

    def read(self, text: Text) -> None:
        """Reads the tokens that were committed since last time."""
        known = len(self.tokens) - self.source
        if known < len(text):
            fresh = text.tokens[known:]
            self.automaton.extend(fresh)
            self.tokens += fresh

    def find(self, path: Sequence[int] = ()) -> tuple[int, int]:
        """State and length of the longest ending of text + `path` that occurs earlier."""
        automaton = self.automaton
        if not path:
            return max(automaton.link[automaton.last], START), automaton.matched
        found = automaton.walk(automaton.last, automaton.read, path, MOST_LINKS)
        if found is None:  # the match shrinks too often on `path`: search only the last tokens
            near = [*self.tokens[max(self.source, len(self.tokens) - NEAR) :], *path]
            return automaton.advance(START, 0, near)
        return found


def history(context: Context) -> History:
    """The row's history, up to date."""
    call = context.call
    found: History = call.memo((History, context.row), lambda: History(_source(call, context.row)))
    found.read(context.text)
    return found


def _source(call: Call, row: int) -> list[int]:
    """The tokens that the row's encoder reads, without padding; empty for a decoder-only target."""
    if call.sources is None or call.sources.input_ids is None:
        return []
    ids, mask = call.sources.input_ids[row], call.sources.attention_mask
    return ids.tolist() if mask is None else ids[mask[row].bool()].tolist()
