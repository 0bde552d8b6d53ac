"""A suffix automaton with counts: for every string in a token sequence, how often it occurs, where last, what follows.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985); online, O(1) amortised per token.
Max-Gram uses the places, suffix decoding the counts; both share one automaton for each text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

__all__ = ["JUNCTION", "MOST_LINKS", "NOWHERE", "START", "SuffixAutomaton"]

START = 0
NOWHERE = -1
JUNCTION = -1
"""A token between documents. No query contains it, so no match spans two documents."""
NO_TOKEN = -2
MOST_LINKS = 32
"""See `SuffixAutomaton`."""
MOST_COMPARED = 64
"""See `SuffixAutomaton.likeliest`."""
LINKS = range(MOST_LINKS)


class SuffixAutomaton:
    """A state stands for a set of strings that end at the same places; `START` stands for the empty string.

    Every new token is one more occurrence of all endings of the sequence. Counts and places are updated only for the
    `MOST_LINKS` longest endings that occurred before. If there are more, as in loops, counts and places of the
    shortest endings are out of date; otherwise all are exact.

    Attributes:
        length: (states,) tokens of a state's longest string.
        link: (states,) the state of that string's longest ending that also occurs elsewhere.
        recent: (states,) the last place where the state's strings end.
        count: (states,) how often they occur.
        token, target: (states,) the first transition of a state. Others are in `more`: state -> token -> state.
        read: tokens read so far.
        last: the state of the whole sequence.
        matched, end: length of the longest ending that occurred earlier, and the last place where it ended.
    """

    def __init__(self) -> None:
        self.length, self.link, self.recent = array("i", [0]), array("i", [NOWHERE]), array("i", [NOWHERE])
        self.count, self.token, self.target = array("i", [0]), array("i", [NO_TOKEN]), array("i", [NOWHERE])
        self.more: dict[int, dict[int, int]] = {}
        self.states, self.read = 1, 0
        self.last, self.matched, self.end = START, 0, NOWHERE

    def extend(self, tokens: Sequence[int]) -> None:
        """Reads `tokens` after those read before."""
        self._reserve(2 * len(tokens))
        length, link, recent, count = self.length, self.link, self.recent, self.count
        first, target, more, more_of = self.token, self.target, self.more, self.more.get
        last, states, place, suffix = self.last, self.states, self.read, START
        for token in tokens:
            new, state = states, last
            states += 1
            length[new], recent[new], last = place + 1, place, new
            while state != NOWHERE:  # every ending without a transition by `token` gets one to `new`
                known = first[state]
                if known == token:
                    suffix = target[state]
                    break
                if known == NO_TOKEN:
                    first[state], target[state] = token, new
                elif (ways := more_of(state)) is None:
                    more[state] = {token: new}
                elif (suffix := ways.setdefault(token, new)) != new:
                    break
                state = link[state]
            else:
                suffix = START
            if state != NOWHERE and length[suffix] != length[state] + 1:
                self._split(state, token, suffix, states)
                suffix = states
                states += 1
            link[new], self.matched, self.end = suffix, length[suffix], recent[suffix]
            for _ in LINKS:
                if suffix == START:
                    break
                recent[suffix] = place
                count[suffix] += 1
                suffix = link[suffix]
            place += 1
        self.last, self.states, self.read = last, states, place

    def _reserve(self, new: int) -> None:
        """Makes room for `new` more states, and some in reserve."""
        missing = self.states + new - len(self.length)
        if missing > 0:
            missing = max(missing, self.states >> 3)
            for values, value in ((self.length, 0), (self.recent, 0), (self.target, NOWHERE), (self.count, 1)):
                values.extend(array("i", [value]) * missing)
            self.link.extend(array("i", [NOWHERE]) * missing)
            self.token.extend(array("i", [NO_TOKEN]) * missing)

    def _split(self, state: int, token: int, whole: int, part: int) -> None:
        """Moves the shorter strings of `whole` to the state `part`, since they now also end elsewhere."""
        self.length[part] = self.length[state] + 1
        for values in (self.link, self.recent, self.count, self.token, self.target):
            values[part] = values[whole]
        self.link[whole] = part
        if whole in self.more:
            self.more[part] = self.more[whole].copy()
        while state != NOWHERE and self.step(state, token) == whole:
            if self.token[state] == token:
                self.target[state] = part
            else:
                self.more[state][token] = part
            state = self.link[state]

    def step(self, state: int, token: int) -> int:
        """The state after `token`, or `NOWHERE`."""
        if self.token[state] == token:
            return self.target[state]
        more = self.more.get(state)
        return NOWHERE if more is None else more.get(token, NOWHERE)

    def walk(self, state: int, matched: int, tokens: Iterable[int], links: int) -> tuple[int, int] | None:
        """Reads `tokens` from `state`; returns the state and length of the longest ending that occurs.

        Args:
            matched: length of the match that `state` stands for.
            links: how often the match may be shortened; after more the answer is None.
        """
        length, link, first, target, more_of = self.length, self.link, self.token, self.target, self.more.get
        for token in tokens:
            while True:
                if first[state] == token:
                    state = target[state]
                    matched += 1
                    break
                ways = more_of(state)
                if ways is not None and token in ways:
                    state = ways[token]
                    matched += 1
                    break
                if state == START:
                    break
                state = link[state]
                matched = length[state]
                links -= 1
                if links < 0:
                    return None
        return state, matched

    def advance(self, state: int, matched: int, tokens: Sequence[int]) -> tuple[int, int]:
        """As `walk`, however often the match must be shortened."""
        found = self.walk(state, matched, tokens, matched + len(tokens))
        assert found is not None  # a match cannot shrink more often than it has grown
        return found

    def continued(self, state: int) -> int:
        """The state of the longest ending that a token follows; `state` itself if one follows its strings."""
        while self.token[state] == NO_TOKEN and state != START:
            state = self.link[state]
        return state

    def followed(self, state: int) -> int:
        """How often a token follows the state's strings: all occurrences but the one at the sequence's end."""
        return self.count[state] - (self.recent[state] == self.read - 1)

    def likeliest(self, state: int) -> tuple[int, int, float]:
        """(token, state, share) of the most frequent transition, in a tie the latest; share 0 if there is none.

        Only the first `MOST_COMPARED` + 1 transitions are compared: frequent ones usually occur early.
        """
        count, recent = self.count, self.recent
        token, found = self.token[state], self.target[state]
        most = 0 if token < 0 else count[found]
        ways = self.more.get(state)
        if ways is not None:
            for other, target in ways.items() if len(ways) <= MOST_COMPARED else islice(ways.items(), MOST_COMPARED):
                times = count[target]
                if (times > most or (times == most and recent[target] > recent[found])) and other >= 0:
                    token, found, most = other, target, times
        return token, found, most / max(self.followed(state), most, 1)

    def transitions(self, state: int) -> list[tuple[float, int, int]]:
        """(share, token, state) of each transition that `likeliest` compares."""
        count, most = self.count, max(self.followed(state), 1)
        found = [(self.token[state], self.target[state])]
        found += islice(self.more.get(state, {}).items(), MOST_COMPARED)
        return [(min(count[target] / most, 1.0), token, target) for token, target in found if token >= 0]
