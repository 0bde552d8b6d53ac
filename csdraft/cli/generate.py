"""`csdraft generate`: streams a text, or runs a chat."""

from __future__ import annotations

import argparse
import os
import sys

from csdraft.cascade import as_drafter
from csdraft.cli._chat import Printer, chat_with
from csdraft.cli._models import chat_of_text, encode, open_models, sampling
from csdraft.data.text import read_utf8

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    if not args.temperature and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p have no effect on greedy text: leave them out, or give --temperature")
    if args.save_report:
        check_writable(args.save_report)  # an error now, and not after the text
    chat = chat_of_text(args)
    if chat is not None and args.prompt is None and args.file is None:
        return chat_with(open_models(args), chat, args)
    prompt = args.prompt
    if prompt is None:
        prompt = read_utf8(args.file) if args.file else sys.stdin.read()
    opened = open_models(args)
    printer = Printer(opened, args.color)
    report = opened.target.generate(
        **encode(opened, prompt, args.max_new_tokens, chat),
        **sampling(args.temperature, top_k=args.top_k, top_p=args.top_p),
        assistant=opened.assistant or as_drafter("auto", opened.target),
        **opened.options,
        max_new_tokens=args.max_new_tokens,
        streamer=printer,
        return_dict_in_generate=True,
    ).report
    if not opened.tokenizer.decode(report.tokens[0], skip_special_tokens=True):
        advice = "; the model has a chat template, which --chat applies"
        may_chat = opened.tokenizer.chat_template is not None and chat is None
        print(f"the target ended the text at once: no text was written{advice * may_chat}", file=sys.stderr)
    if printer.legend:
        print(f"\ntokens by level: {printer.legend}")
    if args.report:
        print(f"\n{report}", file=sys.stderr)
    if args.save_report:
        report.save(args.save_report)
    return 0


def check_writable(path: str) -> None:
    """Raises OSError if no file can be written there; a new one is removed again."""
    is_new = not os.path.exists(path)
    open(path, "a").close()
    if is_new:
        os.remove(os.path.realpath(path))
