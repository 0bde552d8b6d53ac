"""Generate text with drafts, streamed as it is written; with --chat and no prompt, a small chat in the terminal.

The chat reads one line a turn. After each answer it shows how fast it was, and how much of the conversation did not
have to be read again. /reset begins a new conversation, /quit (or end of input) leaves. Without --cascade or --drafter
the text is drafted by assistant="auto", which needs no other model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from csdraft.cascade import as_drafter
from csdraft.cli._chat import chat_with, sampling_of
from csdraft.cli._models import (
    Opened,
    add_chat_arguments,
    add_drafting_arguments,
    add_model_arguments,
    chat_of_text,
    encode,
    open_models,
)
from csdraft.cli._printer import Printer

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_drafting_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="to write on from; it is not printed again")
    source.add_argument(
        "--file", metavar="PATH", help="read the prompt from a file; standard input by default (a chat with --chat)"
    )
    add_chat_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="N")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--color", action="store_true", help="colour each token by the level that drafted it")
    parser.add_argument("--report", action="store_true", help="print how drafting went, on the standard error")
    parser.add_argument("--save-report", metavar="FILE", help="write it as JSON for `csdraft report`")


def run(args: argparse.Namespace) -> int:
    chat = chat_of_text(args)
    if chat is not None and args.prompt is None and args.file is None:
        return chat_with(open_models(args), chat, args)
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
    made = opened.target.generate(
        **inputs,
        **sampling_of(args),
        assistant=opened.assistant,
        **opened.options,
        max_new_tokens=args.max_new_tokens,
        streamer=Printer(opened, sys.stdout, args.color),
        return_dict_in_generate=True,
    )
    return made.report
