"""Text in the terminal while it is generated, each token in the colour of the level that drafted it; and a chat."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from csdraft.cascade import as_drafter
from csdraft.cli._models import Opened, as_inputs, sampling
from csdraft.data.chat import ChatFormat, chat_prompt, check_template
from csdraft.data.messages import Message, is_broken
from csdraft.data.tally import Unusable
from csdraft.decoding.interfaces import Round
from csdraft.decoding.output import RoundStreamer
from csdraft.reports.detokenizer import Detokenizer
from csdraft.reports.report import Report

__all__ = ["Printer", "chat_with"]

COLOURS = (("36", "cyan"), ("33", "yellow"), ("35", "magenta"), ("32", "green"), ("34", "blue"))
"""ANSI codes and names by level, from level 1 on. The terminal's theme chooses the shades."""


class Printer(RoundStreamer):
    """Writes text to the standard output while it is generated, each token in the colour of its level if wanted.

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


COMMANDS = "/reset begins a new conversation, /quit leaves"


@dataclass
class Chat:
    """A conversation with a model; the options are those of `generate`."""

    opened: Opened
    format: ChatFormat
    options: dict[str, Any]
    colour: bool
    messages: list[Message] = field(default_factory=list)
    report: Report | None = None

    def answer(self, line: str) -> str:
        """Writes the answer to the user's line; returns one line with its speed and the number of reused tokens.

        Raises:
            ValueError: the line is not UTF-8, the chat template cannot write the conversation, or the conversation is
                too long for the model. It stays as it was.
        """
        tokenizer, target = self.opened.tokenizer, self.opened.target
        if is_broken(line):
            raise ValueError("the line is not UTF-8 text: set the terminal to UTF-8, or convert the input")
        asked = [*self.messages, {"role": "user", "content": line}]
        ids = chat_prompt(asked, tokenizer, self.format)
        room = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and len(ids) + self.options["max_new_tokens"] > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, an answer may have {self.options['max_new_tokens']}, and "
                f"the model takes {room}: /reset, or start with a smaller --max-new-tokens"
            )
        printer, started = Printer(self.opened, self.colour), time.perf_counter()
        made = target.generate(
            **as_inputs(self.opened, ids), **self.options, streamer=printer, return_dict_in_generate=True
        )
        seconds = time.perf_counter() - started
        new = made.sequences[0].tolist()[0 if target.config.is_encoder_decoder else len(ids) :]
        self.report = made.report if self.report is None else self.report.merged(made.report)
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        self.messages = [*asked, {"role": "assistant", "content": text}]
        count = len(new)
        speed = f"{count} tokens, {count / seconds:.1f} tokens/s, {count / made.report.rounds:.1f} tokens a round"
        reused = f"{printer.reused} of {len(ids)} prompt tokens reused"
        return "; ".join(filter(None, (speed, reused, printer.legend)))


def chat_with(opened: Opened, format: ChatFormat, args: argparse.Namespace) -> int:
    """Chats until /quit or the end of the input. Hints and figures are written to the standard error."""
    check_template(opened.tokenizer, "--chat without a prompt is a chat", format)
    assistant = opened.assistant or as_drafter("auto", opened.target)
    warpers = sampling(args.temperature, top_k=args.top_k, top_p=args.top_p)
    options = {"assistant": assistant, "max_new_tokens": args.max_new_tokens, **opened.options, **warpers}
    chat = Chat(opened, format, options, args.color or sys.stdout.isatty())
    drafting = "" if opened.assistant is not None else 'no drafter named: drafting with assistant="auto". '
    _tell(f"{drafting}{COMMANDS}")
    for line in _lines():
        if line == "/reset":
            chat.messages = []
            _tell("a new conversation")
        elif line.startswith("/"):
            _tell(f"{line} is not a command: {COMMANDS}")
        elif line:
            _turn(chat, line)
    if chat.report is not None:
        if args.report:
            _tell(f"\n{chat.report}")
        if args.save_report:
            chat.report.save(args.save_report)
    return 0


def _turn(chat: Chat, line: str) -> None:
    """Answers one line. Errors are written, and the chat continues."""
    try:
        _tell(f"[{chat.answer(line)}]")
    except Unusable as error:
        _tell(f"the chat template cannot write this conversation: it has {error}; /reset begins a new one")
    except ValueError as error:
        _tell(str(error))
    except KeyboardInterrupt:
        _tell("\nstopped; this turn is forgotten")


def _lines() -> Iterator[str]:
    """The user's lines up to /quit, without blanks around them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line or line.strip() == "/quit":
            return
        yield line.strip()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
