"""What a drafting head in a folder is, what it needs, and which serving engines would load it."""

from __future__ import annotations

import argparse

from csdraft.heads.stored_head import config_at, head_at

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="path or Hub id of the head")


def run(args: argparse.Namespace) -> int:
    head = head_at(args.folder)
    if head is None:
        raise ValueError(f"{args.folder!r} holds no drafting head that csdraft knows; `csdraft check` looks at models")
    lines = head.described()
    for engine, reason in head.refusals(config_at(args.folder) or {}).items():
        lines[engine] = "loads it" if reason is None else f"would not: {reason}"
    width = max(map(len, lines))
    for topic, words in lines.items():
        print(f"{topic:{width}}  {words}")
    return 0
