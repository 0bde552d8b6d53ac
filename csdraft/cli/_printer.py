"""Writes text to a terminal as it is produced, each token in the colour of the level that drafted it."""

from __future__ import annotations

from collections import Counter
from typing import TextIO

from torch import Tensor

from csdraft.cli._models import Opened
from csdraft.decoding.interfaces import Round
from csdraft.decoding.output import RoundStreamer
from csdraft.reports.detokenizer import Detokenizer

__all__ = ["Printer"]

COLOURS = (("36", "cyan"), ("33", "yellow"), ("35", "magenta"), ("32", "green"), ("34", "blue"))
"""ANSI codes by level, from 1 on; a terminal's own theme decides how they look on its background."""


class Printer(RoundStreamer):
    """Writes text as it is produced, each token in its level's colour if wanted.

    Args:
        opened: whose tokenizer turns tokens into text.
        file: where to write.
        colour: whether to colour.
    """

    def __init__(self, opened: Opened, file: TextIO, colour: bool):
        self.tokenizer, self.file, self.colour = opened.tokenizer, file, colour
        self.encoder_decoder = opened.target.config.is_encoder_decoder
        self.pieces: Detokenizer | None = None
        self.names: list[str] = []
        self.counts: Counter[int] = Counter()

    def put(self, value: Tensor) -> None:
        """The prompt first, which is not written; then, when nothing drafts, single tokens."""
        if self.pieces is None:
            prompt = [] if self.encoder_decoder else value.view(-1).tolist()
            self.pieces = Detokenizer(self.tokenizer, after=prompt)
            return
        for token in value.view(-1).tolist():
            self._write(token, 0)
        self.file.flush()

    def put_round(self, finished: Round) -> None:
        self.names = finished.context.call.level_names
        for token, level in zip(finished.tokens, finished.levels, strict=True):
            self.counts[level] += 1
            self._write(token, level)
        self.file.flush()

    def _write(self, token: int, level: int) -> None:
        assert self.pieces is not None
        self.file.write(self._painted(self.pieces.push(token), level))

    def _painted(self, text: str, level: int) -> str:
        if not (self.colour and level and text):
            return text
        return f"\x1b[{COLOURS[(level - 1) % len(COLOURS)][0]}m{text}\x1b[0m"

    def end(self) -> None:
        if self.pieces is not None:
            self.file.write(self.pieces.flush())
        self.file.write("\n")
        if self.colour and self.counts:
            self.file.write(f"\ntokens by level: {', '.join(map(self._legend, sorted(self.counts)))}\n")
        self.file.flush()

    def _legend(self, level: int) -> str:
        colour = COLOURS[(level - 1) % len(COLOURS)][1] if level else "no colour"
        return self._painted(f"{self.names[level]} ({colour}) {self.counts[level]}", level)
