"""A chat in the terminal: a line from the user, the answer as it is written, and how fast it was."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from csdraft.cascade import as_drafter
from csdraft.cli._models import Opened, as_inputs
from csdraft.cli._printer import Printer
from csdraft.data.chat import ChatFormat, chat_prompt, check_template
from csdraft.data.messages import Message
from csdraft.data.tally import Unusable
from csdraft.decoding.interfaces import Round
from csdraft.reports.report import Report

__all__ = ["Answer", "chat_with", "sampling_of"]

COMMANDS = "/reset begins a new conversation, /quit leaves"


@dataclass(frozen=True)
class Answer:
    """One turn of the assistant, in figures.

    Attributes:
        text: of the answer, without special tokens.
        tokens: that were written.
        seconds: that it took, reading the prompt included.
        rounds: forwards of the target that wrote them.
        prompt: tokens of the conversation up to the answer.
        reused: those of them that had been read in earlier turns.
    """

    text: str
    tokens: int
    seconds: float
    rounds: int
    prompt: int
    reused: int

    def __str__(self) -> str:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        each = self.tokens / self.rounds if self.rounds else 0.0
        return (
            f"{self.tokens} tokens, {speed:.1f} tokens/s, {each:.1f} tokens a round; "
            f"{self.reused} of {self.prompt} prompt tokens reused"
        )


class ChatPrinter(Printer):
    """Streams an answer, and notes how much of the prompt the target did not read again."""

    reused = 0

    def put_round(self, finished: Round) -> None:
        if not self.counts:
            call = finished.context.call
            read = call.session(call.target).use.fed - len(finished.draft)
            self.reused = max(len(finished.context.text) - read, 0)
        super().put_round(finished)

    def end(self) -> None:
        if self.pieces is not None:
            self.file.write(self.pieces.flush())
        self.file.write("\n")
        self.file.flush()

    @property
    def legend(self) -> str:
        """Which colour is whose, if there are colours."""
        return ", ".join(map(self._legend, sorted(self.counts))) if self.colour else ""


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        opened: the models.
        chat: how conversations become tokens.
        options: of `generate`.
        file: where answers are written.
        colour: whether tokens are coloured by level.
    """

    opened: Opened
    chat: ChatFormat
    options: dict[str, Any]
    file: TextIO
    colour: bool
    messages: list[Message] = field(default_factory=list)
    report: Report | None = None
    legend: str = ""

    def answer(self, line: str) -> Answer:
        """Writes the answer to the user's line.

        Raises:
            ValueError: the conversation cannot be written in the chat template, or is too long for the model; the line
                is then forgotten.
        """
        tokenizer, target = self.opened.tokenizer, self.opened.target
        asked = [*self.messages, {"role": "user", "content": line}]
        ids = chat_prompt(asked, tokenizer, self.chat)
        room = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and len(ids) + self.options["max_new_tokens"] > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, an answer may have {self.options['max_new_tokens']}, and "
                f"the model takes {room}: /reset, or start with a smaller --max-new-tokens"
            )
        printer, started = ChatPrinter(self.opened, self.file, self.colour), time.perf_counter()
        made = target.generate(
            **as_inputs(self.opened, ids), **self.options, streamer=printer, return_dict_in_generate=True
        )
        seconds = time.perf_counter() - started
        new = made.sequences[0].tolist()[0 if target.config.is_encoder_decoder else len(ids) :]
        self.report = made.report if self.report is None else self.report.merged(made.report)
        self.legend = printer.legend
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return Answer(text, len(new), seconds, made.report.rounds, len(ids), printer.reused)


def chat_with(opened: Opened, chat: ChatFormat, args: argparse.Namespace) -> int:
    """Chats until /quit or the end of the input; hints and figures go to the standard error."""
    check_template(opened.tokenizer, "--chat without a prompt is a chat", chat)
    assistant = opened.assistant or as_drafter("auto", opened.target)
    options = {"assistant": assistant, "max_new_tokens": args.max_new_tokens, **opened.options, **sampling_of(args)}
    if opened.target.generation_config.pad_token_id is None:
        options["pad_token_id"] = opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id
    talk = Chat(opened, chat, options, sys.stdout, args.color or sys.stdout.isatty())
    drafting = "" if opened.assistant is not None else 'no drafter named: drafting with assistant="auto". '
    _tell(f"{drafting}{COMMANDS}")
    for line in _lines():
        if line == "/reset":
            talk.messages = []
            _tell("a new conversation")
        elif line.startswith("/"):
            _tell(f"{line} is no command; {COMMANDS}")
        elif line:
            _turn(talk, line)
    if args.report and talk.report is not None:
        _tell(f"\n{talk.report}")
    if args.save_report and talk.report is not None:
        talk.report.save(args.save_report)
    return 0


def _turn(talk: Chat, line: str) -> None:
    try:
        figures = str(talk.answer(line))
    except Unusable as error:
        _tell(f"the chat template cannot write this conversation: it has {error}; /reset begins a new one")
    except ValueError as error:
        _tell(str(error))
    except KeyboardInterrupt:
        _tell("\nstopped; this turn is forgotten")
    else:
        _tell(f"[{figures}{f'; {talk.legend}' if talk.legend else ''}]")


def _lines() -> Iterator[str]:
    """The user's lines, without blanks around them, up to /quit."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        yield line.strip()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `generate` for --temperature, --top-k and --top-p."""
    if args.temperature <= 0:
        return {"do_sample": False}
    given = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return {name: value for name, value in given.items() if value is not None}
