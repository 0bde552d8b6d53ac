"""A bounded table of earlier outputs, kept from call to call for suffix decoding (arXiv 2411.04975)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from csdraft.stored import naming
from csdraft.tables._file import read_arrays, write_arrays
from csdraft.tables._kept import kept_for
from csdraft.tables.speculation import NOTHING, Rule, Speculation
from csdraft.tables.suffix_automaton import JUNCTION, START, SuffixAutomaton

__all__ = ["OutputTable", "Place"]

FORMAT = "csdraft-outputs-1"
MOST_GENERATIONS = 2
KEPT = 1 << 16
"""The most tokens of the table that the process keeps for a target."""
NEAR = 24
"""When a text is new to a table, only its last NEAR tokens are searched for a match."""


@dataclass
class Place:
    """How far one text has been matched with a table, so that next time only its new tokens are read.

    Attributes:
        read: tokens of the text that were read.
        matches: id of an automaton -> (the automaton, state and length of the longest match in it).
    """

    read: int = 0
    matches: dict[int, tuple[SuffixAutomaton, int, int]] = field(default_factory=dict)


class OutputTable:
    """The latest outputs, in two generations of at most half the tokens each. The older one is dropped as a whole.

    Threads may share one.

    Args:
        max_tokens: the most tokens that it holds; each takes about 140 bytes. Of each output it keeps at most half as
            many, the last ones.

    Attributes:
        lock: held while it changes.
        largest: the largest token id that was ever added; -1 if there was none.
    """

    def __init__(self, max_tokens: int = 1 << 18):
        if max_tokens < 4:
            raise ValueError(f"max_tokens={max_tokens} of an OutputTable must be at least 4")
        self.max_tokens = max_tokens
        self.lock = threading.Lock()
        self._generations: list[tuple[SuffixAutomaton, list[int]]] = []  # the newest first, two at most
        self.largest = -1

    @classmethod
    def of(cls, target: Any) -> OutputTable:
        """The table that this process keeps for a target, until the target is gone."""
        return kept_for(target, cls, lambda: cls(KEPT))

    def __len__(self) -> int:
        """Tokens held, plus one for the end of each output."""
        with self.lock:
            return sum(len(tokens) for _, tokens in self._generations)

    @property
    def outputs(self) -> list[list[int]]:
        """The outputs that it holds, oldest first."""
        with self.lock:
            flat = [token for _, tokens in reversed(self._generations) for token in tokens]
        found: list[list[int]] = [[]]
        for token in flat:
            if token == JUNCTION:
                found.append([])
            else:
                found[-1].append(token)
        return found[:-1]

    def add(self, output: Sequence[int]) -> None:
        """Adds an output, and drops the oldest ones if there are too many tokens."""
        half = self.max_tokens // 2
        tokens = [*output[-(half - 1) :], JUNCTION]
        if len(tokens) == 1:
            return
        if min(output) < 0:
            raise ValueError(f"an output has token {min(output)}; token ids are 0 or more")
        with self.lock:
            self.largest = max(self.largest, *output)
            if not self._generations or len(self._generations[0][1]) + len(tokens) > half:
                self._generations = [(SuffixAutomaton(), []), *self._generations[:1]]
            automaton, known = self._generations[0]
            automaton.extend(tokens)
            known += tokens

    def match(self, tokens: Sequence[int], place: Place | None = None) -> int:
        """Length of the longest ending of `tokens` that occurs in an output.

        Args:
            tokens: a text.
            place: how far the text was matched before; None: only its last `NEAR` tokens are searched.
        """
        with self.lock:
            return max((matched for _, _, matched in self._moved(tokens, place or Place())), default=0)

    def matches(
        self, tokens: Sequence[int], path: Sequence[int], place: Place
    ) -> list[tuple[SuffixAutomaton, int, int]]:
        """(automaton, state, length) of the longest ending of `tokens` + `path` in each automaton.

        To read on from these states, the caller must hold the `lock`.
        """
        with self.lock:
            found = self._moved(tokens, place)
            return [(a, *a.advance(state, matched, path)) for a, state, matched in found]

    def speculate(
        self, tokens: Sequence[int], rule: Rule, path: Sequence[int] = (), place: Place | None = None
    ) -> Speculation:
        """The best proposal of what follows the text `tokens` and the drafted `path`; `place` as in `match`."""
        with self.lock:
            found = self._moved(tokens, place or Place())
            tried = [rule.best(a, *a.advance(state, matched, path)) for a, state, matched in found]
        return max([NOTHING, *tried], key=lambda speculation: speculation.score)

    def _moved(self, tokens: Sequence[int], place: Place) -> list[tuple[SuffixAutomaton, int, int]]:
        """Brings `place` up to date: extends known matches, and searches the automata that it does not know."""
        matches, fresh = {}, tokens[place.read :] if place.read + NEAR > len(tokens) else None
        for automaton, _ in self._generations:
            known = place.matches.get(id(automaton))
            if known is None or fresh is None:
                found = automaton.advance(START, 0, tokens[-NEAR:])
            else:
                _, state, matched = known
                while automaton.length[automaton.link[state]] >= matched > 0:  # the state was split meanwhile
                    state = automaton.link[state]
                found = automaton.advance(state, matched, fresh)
            matches[id(automaton)] = (automaton, *found)
        place.read, place.matches = len(tokens), matches
        return list(matches.values())

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        with self.lock:
            parts = [np.array(tokens, np.int32) for _, tokens in reversed(self._generations)]
        arrays = {f"generation.{i}": part for i, part in enumerate(parts)} | {"count": np.array([len(parts)])}
        write_arrays(path, FORMAT, arrays, max_tokens=str(self.max_tokens))

    @classmethod
    def load(cls, path: str | Path) -> OutputTable:
        """Reads what `save` wrote; the table then proposes the same as the saved one."""
        way_out = "save one with OutputTable.save"
        count = int(read_arrays(path, FORMAT, {"count": ("I64", 1)}, way_out)[0]["count"].sum())
        if not 0 <= count <= MOST_GENERATIONS:
            raise ValueError(f"{path}: count={count}, a table has at most {MOST_GENERATIONS} generations: {way_out}")
        names = [f"generation.{i}" for i in range(count)]
        parts, metadata = read_arrays(path, FORMAT, {name: ("I32", 1) for name in names}, way_out)
        if not (most := metadata.get("max_tokens", "")).isdecimal():
            raise ValueError(f"{path} has max_tokens {most!r}, expected a number: {way_out}")
        with naming(path):
            table = cls(int(most))
            for name in names:
                table._restore(parts[name].tolist())
        return table

    def _restore(self, tokens: list[int]) -> None:
        if not tokens or min(tokens) < JUNCTION or tokens[-1] != JUNCTION:
            raise ValueError(f"a generation must be outputs of token ids, each followed by {JUNCTION}")
        automaton = SuffixAutomaton()
        automaton.extend(tokens)
        self._generations.insert(0, (automaton, tokens))
        self.largest = max(self.largest, *tokens)
