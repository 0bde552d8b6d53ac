"""One row's searchable history, shared by all drafters that look things up in it."""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Context
from csdraft.decoding.text import Text
from csdraft.tables.suffix_automaton import JUNCTION, MOST_LINKS, START, SuffixAutomaton

__all__ = ["NEAR", "History", "history"]

NEAR = 16


class History:
    """What a row's encoder reads, if it has one, and its committed text.

    Args:
        source: a document in front of the text. No match spans the two: the automaton reads a junction in place of
            its last token, the one token of a document that nothing follows, to be copied but never matched.
    """

    def __init__(self, source: Sequence[int] = ()):
        self.source = len(source)
        self.tokens = list(source)
        self.automaton = SuffixAutomaton()
        if source:
            self.automaton.extend([*source[:-1], JUNCTION])

    def read(self, text: Text) -> None:
        """Takes in what was committed since last time."""
        known = len(self.tokens) - self.source
        if known < len(text):
            fresh = text.tokens[known:]
            self.automaton.extend(fresh)
            self.tokens += fresh

    def find(self, path: Sequence[int] = ()) -> tuple[int, int]:
        """State and length of the longest ending of text and `path` that occurs earlier."""
        automaton = self.automaton
        if not path:
            return max(automaton.link[automaton.last], START), automaton.matched
        found = automaton.walk(automaton.last, automaton.read, path, MOST_LINKS)
        if found is None:  # long matches nested in each other by the dozen, and `path` continues from none
            near = [*self.tokens[max(self.source, len(self.tokens) - NEAR) :], *path]
            found = automaton.walk(START, 0, near, len(near))
        return found or (START, 0)


def history(context: Context) -> History:
    """The row's history, up to date."""
    call = context.call
    found: History = call.memo((History, context.row), lambda: History(_source(call, context.row)))
    found.read(context.text)
    return found


def _source(call: Call, row: int) -> list[int]:
    """What the row's encoder reads, padding excluded; empty for a decoder-only target."""
    if call.sources is None or call.sources.input_ids is None:
        return []
    ids, mask = call.sources.input_ids[row], call.sources.attention_mask
    return ids.tolist() if mask is None else ids[mask[row].bool()].tolist()
