"""Max-Gram: copies what followed the longest earlier occurrence of the text's last tokens; no model, microseconds.

Cascade Speculative Drafting (arXiv 2312.11462, appendix A), where it is the last drafter of every cascade. Use it
there, or alone if the output repeats the input: summaries, edits, retrieved passages, code. Unlike the paper's code it
reads prompt and text as one history, takes the most recent of the longest matches, and is fast at any text length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.decoding.limits import check_range
from csdraft.drafters._history import History, history
from csdraft.drafters._lookup import Lookup, check_vocabulary, match_evidence
from csdraft.tables.bigram import BigramTable

__all__ = ["MaxGram"]


@dataclass(frozen=True)
class MaxGram(Lookup):
    """Finds the longest ending of text and draft that occurs earlier, and proposes what followed it last time.

    A copy that reaches the end of the history continues with its own tokens, so a loop is drafted to any depth. For
    encoder-decoders it also searches the encoder's input; no match spans both that and the text.

    Args:
        depth: tokens per round, unless a schedule or a cascade says otherwise.
        min_match: the shortest match to copy from; 1 as in the paper.
        bigram: a `BigramTable` to draft from where nothing matches, or the path of a saved one; None drafts nothing
            there.
    """

    depth: int = 10  # type: ignore[assignment]
    min_match: int = 1
    bigram: BigramTable | str | Path | None = None

    def __post_init__(self) -> None:
        check_range("a MaxGram", self, depth=None, min_match=None)
        self.load_option("bigram", BigramTable)

    def check(self, call: Call) -> None:
        if isinstance(self.bigram, BigramTable):
            way_out = "build it with the target's tokenizer: scripts/build_bigrams.py"
            check_vocabulary(call, "the bigram table", len(self.bigram) - 1, way_out)

    def evidence(self, context: Context) -> int:
        return match_evidence(history(context).automaton.matched, self.min_match)

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        tokens = _copied(history(context), path, depth, self.min_match)
        if not tokens and isinstance(self.bigram, BigramTable):
            last = path[-1:] or context.text.tail(1)
            tokens = self.bigram.after(last[0], depth) if last else []
        return self.chain(context, tokens)


def _copied(known: History, path: list[int], depth: int, min_match: int) -> list[int]:
    """At most `depth` tokens that followed the longest match of the end of text + `path`."""
    automaton = known.automaton
    if path:
        state, matched = known.find(path)
        start = automaton.recent[state] + 1
    else:
        matched, start = automaton.matched, automaton.end + 1
    if matched < min_match:
        return []
    if start < known.source:
        return known.tokens[start : min(start + depth, known.source)]
    ahead = known.tokens[start : start + depth]
    if len(ahead) < depth:
        ahead += path
        ahead = (ahead * (depth // len(ahead) + 1))[:depth]
    return ahead
