"""Max-Gram: copies what followed the longest earlier occurrence of the text's ending; no model, microseconds a draft.

Cascade Speculative Drafting (arXiv 2312.11462, appendix A), where it is the last drafter of every cascade. Use it so,
or alone when the output repeats the input: summaries, edits, retrieved passages, code. It differs from the paper's
code in reading prompt and text as one history, in taking the most recent of the longest matches, and in its cost.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.decoding.text import Text
from csdraft.tables.bigram import BigramTable

__all__ = ["MaxGram"]

START = 0
NOWHERE = -1
JUNCTION = -1
NO_TOKEN = -2
MOST_LINKS = 32
NEAR = 16
LONG_MATCHES = (2, 4, 8)
"""Matches of at least so many tokens are evidence of their own kinds."""


@dataclass(frozen=True)
class MaxGram(Drafter):
    """Finds the longest ending of text and draft that occurs earlier, and proposes what followed it last time.

    A match that reaches the end of the history goes on copying from its own proposal: a loop is drafted to any depth.
    For encoder-decoders it also searches the encoder's input; no match spans the two.

    Args:
        depth: tokens a round unless a schedule or a cascade says otherwise.
        min_match: shortest match worth copying from; 1 as in the paper.
        bigram: what to go on with where nothing matches: a `BigramTable`, or the path of a saved one. None: nothing.
    """

    depth: int = 10  # type: ignore[assignment]
    min_match: int = 1
    bigram: BigramTable | str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("min_match", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} of a MaxGram must be at least {least}")
        if isinstance(self.bigram, (str, Path)):
            object.__setattr__(self, "bigram", BigramTable.load(self.bigram))

    def check(self, call: Call) -> None:
        if isinstance(self.bigram, BigramTable) and len(self.bigram) > call.vocab:
            raise ValueError(
                f"the bigram table has {len(self.bigram)} tokens, the target {call.vocab}; "
                "build it with the target's tokenizer: scripts/build_bigrams.py"
            )

    def evidence(self, context: Context) -> int:
        matched = self._index(context).matched
        return 0 if matched < self.min_match else 1 + sum(matched >= length for length in LONG_MATCHES)

    def _index(self, context: Context) -> _Index:
        """The row's index, up to date; every MaxGram of a cascade reads the same text, so they share it."""
        call = context.call
        index: _Index = call.memo((_Index, context.row), lambda: _Index(_source(call, context.row)))
        index.read(context.text)
        return index

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._propose(c, min(b.depth, b.room)) for c, b in zip(contexts, budgets, strict=True)]

    def _propose(self, context: Context, depth: int) -> Draft:
        call, path = context.call, context.path
        eos = call.head.stopping.eos
        if depth <= 0 or (path and path[-1] in eos):
            return context.draft
        tokens = self._index(context).propose(path, depth, self.min_match)
        if not tokens and isinstance(self.bigram, BigramTable):
            last = path[-1:] or context.text.tail(1)
            tokens = self.bigram.after(last[0], depth) if last else []
        if not eos.isdisjoint(tokens):
            tokens = tokens[: 1 + next(i for i, token in enumerate(tokens) if token in eos)]
        return context.draft.extend(tokens, call.level(self))


def _source(call: Call, row: int) -> list[int]:
    """What the row's encoder reads, padding excluded; empty for a decoder-only target."""
    if call.sources is None or call.sources.input_ids is None:
        return []
    ids, mask = call.sources.input_ids[row], call.sources.attention_mask
    return ids.tolist() if mask is None else ids[mask[row].bool()].tolist()


class _Index:
    """A suffix automaton (Blumer et al., 1985) of the source and the committed text, O(1) amortised a token.

    A state stands for a set of strings that end at the same places. `length` is its longest string's, `link` the
    state of that string's longest ending that occurs elsewhere too, `recent` the last place where its strings end.
    Most states have one way on, kept in `token` and `target`; other ways are in `more`.

    Args:
        source: a document in front of the text. No match spans the two: the automaton reads a junction in place of
            its last token, the one token of a document that nothing follows, to be copied but never matched.
    """

    def __init__(self, source: Sequence[int] = ()):
        self.source = len(source)
        self.tokens = list(source)
        self.length, self.link, self.recent = array("i", [0]), array("i", [NOWHERE]), array("i", [NOWHERE])
        self.token, self.target = array("i", [NO_TOKEN]), array("i", [NOWHERE])
        self.more: dict[int, dict[int, int]] = {}
        self.last = START
        self.matched, self.end = 0, NOWHERE
        """The longest ending of what was read that occurs earlier, and where."""
        for position, token in enumerate((*source[:-1], JUNCTION) if source else ()):
            self._append(token, position)

    def read(self, text: Text) -> None:
        """Takes in what was committed since last time."""
        tokens = self.tokens
        if len(tokens) - self.source < len(text):
            for token in text.tokens[len(tokens) - self.source :]:
                self._append(token, len(tokens))
                tokens.append(token)

    def propose(self, path: list[int], depth: int, min_match: int) -> list[int]:
        """`depth` tokens, or as many as are known, that followed the longest match of the text and `path`."""
        matched, end = self.find(path) if path else (self.matched, self.end)
        if matched < min_match:
            return []
        start = end + 1
        if start < self.source:
            return self.tokens[start : min(start + depth, self.source)]
        ahead = self.tokens[start : start + depth]
        if len(ahead) < depth:
            ahead += path
            ahead = (ahead * (depth // len(ahead) + 1))[:depth]
        return ahead

    def find(self, path: Sequence[int]) -> tuple[int, int]:
        """Length and last place of the longest ending of text and `path` that occurs in what was read."""
        found = self._walk(self.last, path, MOST_LINKS)
        if found is None:  # long matches nested in each other by the dozen, and `path` goes on from none
            text = self.tokens[max(self.source, len(self.tokens) - NEAR) :]
            found = self._walk(START, [*text, *path], NEAR + len(path))
        return found or (0, NOWHERE)

    def _walk(self, state: int, tokens: Iterable[int], links: int) -> tuple[int, int] | None:
        """The longest match after reading `tokens` from `state`; None after following too many links."""
        length, link, step = self.length, self.link, self._step
        matched = length[state]
        for token in tokens:
            while (target := step(state, token)) == NOWHERE and state != START:
                state = link[state]
                matched = length[state]
                links -= 1
                if links < 0:
                    return None
            if target != NOWHERE:
                state = target
                matched += 1
        return matched, self.recent[state]

    def _step(self, state: int, token: int) -> int:
        if self.token[state] == token:
            return self.target[state]
        more = self.more.get(state)
        return NOWHERE if more is None else more.get(token, NOWHERE)

    def _append(self, token: int, position: int) -> None:
        length, link, recent = self.length, self.link, self.recent
        new = self._add(length[self.last] + 1, position)
        state = self._lead(self.last, token, new)
        if state == NOWHERE:
            suffix = START
        else:
            suffix = self._step(state, token)
            if length[suffix] != length[state] + 1:
                suffix = self._split(state, token, suffix)
        link[new] = suffix
        self.last, self.matched, self.end = new, length[suffix], recent[suffix]
        # Every ending of the text now occurs here; beyond a bounded number of them, an older place will do.
        for _ in range(MOST_LINKS):
            if suffix == START:
                break
            recent[suffix] = position
            suffix = link[suffix]

    def _lead(self, state: int, token: int, new: int) -> int:
        """Leads `state` and those it links to on to `new`, up to the first that has a way on; returns that one."""
        first, more, link = self.token, self.more, self.link
        while state != NOWHERE:
            if first[state] == token:
                break
            if first[state] == NO_TOKEN:
                first[state], self.target[state] = token, new
            elif state not in more:
                more[state] = {token: new}
            elif token in more[state]:
                break
            else:
                more[state][token] = new
            state = link[state]
        return state

    def _split(self, state: int, token: int, whole: int) -> int:
        """Parts the shorter strings of `whole`, which from now on end in one more place, from its longer ones."""
        part = self._add(self.length[state] + 1, self.recent[whole])
        self.link[part], self.link[whole] = self.link[whole], part
        self.token[part], self.target[part] = self.token[whole], self.target[whole]
        if whole in self.more:
            self.more[part] = self.more[whole].copy()
        while state != NOWHERE and self._step(state, token) == whole:
            if self.token[state] == token:
                self.target[state] = part
            else:
                self.more[state][token] = part
            state = self.link[state]
        return part

    def _add(self, length: int, recent: int) -> int:
        self.length.append(length)
        self.recent.append(recent)
        self.link.append(NOWHERE)
        self.token.append(NO_TOKEN)
        self.target.append(NOWHERE)
        return len(self.length) - 1
