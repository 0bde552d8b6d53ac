"""`csdraft export`: writes a drafter in the format of a serving engine."""

from __future__ import annotations

import argparse

import transformers

from csdraft.export import export_drafter
from csdraft.heads.engines import ENGINES

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    transformers.utils.logging.disable_progress_bar()
    serve = export_drafter(args.drafter, args.folder, args.to, args.target, args.tokens)
    print(f"{args.folder} is for {ENGINES[args.to]}; serve it with\n\n  {serve}")
    return 0
