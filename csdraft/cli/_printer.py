"""Writes text to the terminal while it is generated; each token can have the colour of the level that drafted it."""

from __future__ import annotations

import sys
from collections import Counter

from torch import Tensor

from csdraft.cli._models import Opened
from csdraft.decoding.interfaces import Round
from csdraft.decoding.output import RoundStreamer
from csdraft.reports.detokenizer import Detokenizer

__all__ = ["Printer"]

COLOURS = (("36", "cyan"), ("33", "yellow"), ("35", "magenta"), ("32", "green"), ("34", "blue"))
"""ANSI codes and names by level, from level 1 on. The terminal's theme chooses the shades."""


class Printer(RoundStreamer):
    """Writes text to the standard output while it is generated.

    Args:
        opened: its tokenizer turns tokens into text.
        colour: whether to colour tokens by level.

    Attributes:
        reused: prompt tokens that the target did not read in this call, since it had read them in an earlier one.
    """

    def __init__(self, opened: Opened, colour: bool):
        self.tokenizer, self.colour = opened.tokenizer, colour
        self.encoder_decoder = opened.target.config.is_encoder_decoder
        self.detokenizer: Detokenizer | None = None
        self.names: list[str] = []
        self.counts: Counter[int] = Counter()
        self.reused = 0

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, which is not written; then, if there is no drafter, single tokens."""
        if self.detokenizer is None:
            prompt = [] if self.encoder_decoder else value.view(-1).tolist()
            self.detokenizer = Detokenizer(self.tokenizer, after=prompt)
            return
        for token in value.view(-1).tolist():
            self._write(token, 0)
        sys.stdout.flush()

    def put_round(self, finished: Round) -> None:
        call = finished.context.call
        if not self.counts:
            read = call.session(call.target).use.fed - len(finished.draft)
            self.reused = max(len(finished.context.text) - read, 0)
        self.names = call.level_names
        for token, level in zip(finished.tokens, finished.levels, strict=True):
            self.counts[level] += 1
            self._write(token, level)
        sys.stdout.flush()

    def _write(self, token: int, level: int) -> None:
        assert self.detokenizer is not None  # the prompt came first
        sys.stdout.write(self._painted(self.detokenizer.push(token), level))

    def _painted(self, text: str, level: int) -> str:
        if not (self.colour and level and text):
            return text
        return f"\x1b[{COLOURS[(level - 1) % len(COLOURS)][0]}m{text}\x1b[0m"

    def end(self) -> None:
        print(self.detokenizer.flush() if self.detokenizer is not None else "", flush=True)

    @property
    def legend(self) -> str:
        """The levels with their colours and counts of tokens; empty if tokens are not coloured."""
        return ", ".join(map(self._named, sorted(self.counts))) if self.colour else ""

    def _named(self, level: int) -> str:
        colour = COLOURS[(level - 1) % len(COLOURS)][1] if level else "no colour"
        return self._painted(f"{self.names[level]} ({colour}) {self.counts[level]}", level)
