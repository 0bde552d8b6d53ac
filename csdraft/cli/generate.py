"""Generate text with drafts, streamed as it is written, and say how drafting went."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from csdraft.cascade import as_drafter
from csdraft.cli._models import (
    Opened,
    add_chat_arguments,
    add_drafting_arguments,
    add_model_arguments,
    chat_of_text,
    encode,
    open_models,
)
from csdraft.decoding.interfaces import Round
from csdraft.decoding.output import RoundStreamer
from csdraft.decoding.pieces import Pieces

__all__ = ["Printer", "add_arguments", "run"]

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
        self.pieces: Pieces | None = None
        self.names: list[str] = []
        self.counts: Counter[int] = Counter()

    def put(self, value: Tensor) -> None:
        """The prompt, which is not written."""
        self.pieces = Pieces(self.tokenizer, after=[] if self.encoder_decoder else value.view(-1).tolist())

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_drafting_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--file", metavar="PATH", help="read the prompt from a file; standard input by default")
    add_chat_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--color", action="store_true", help="colour each token by the level that drafted it")
    parser.add_argument("--report", action="store_true", help="print how drafting went, on the standard error")
    parser.add_argument("--save-report", metavar="FILE", help="write it as JSON for `csdraft report`")


def run(args: argparse.Namespace) -> int:
    chat = chat_of_text(args)
    if args.prompt is not None:
        prompt = args.prompt
    else:
        prompt = Path(args.file).read_text() if args.file else sys.stdin.read()
    opened = open_models(args)
    if opened.assistant is None:
        opened = replace(opened, assistant=as_drafter("auto", opened.target))
    report = _generate(opened, encode(opened, prompt, chat), args)
    if args.report:
        print(f"\n{report}", file=sys.stderr)
    if args.save_report:
        report.save(args.save_report)
    return 0


def _generate(opened: Opened, inputs: dict[str, Tensor], args: argparse.Namespace) -> Any:
    """Streams the text; returns the report."""
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        sampling = {name: value for name, value in sampling.items() if value is not None}
    made = opened.target.generate(
        **inputs,
        **sampling,
        assistant=opened.assistant,
        **opened.options,
        max_new_tokens=args.max_new_tokens,
        streamer=Printer(opened, sys.stdout, args.color),
        return_dict_in_generate=True,
    )
    return made.report
