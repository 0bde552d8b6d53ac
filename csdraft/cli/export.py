"""Write a drafter as a serving engine loads it: vLLM, SGLang or speculators.

A head is written in the engine's layout, an adapter is merged into its base, and a drafter that is tied to its target
gets the target's embedding. Nothing is written that the engine would refuse: then the reasons are printed, each with
the key and a way out. The last line is the command that serves the target with the drafter.

  csdraft export out/qwen3-8b/eagle3 served/eagle3 --to vllm --target Qwen/Qwen3-8B
"""

from __future__ import annotations

import argparse

import transformers

from csdraft.export import export_drafter
from csdraft.heads.engines import ENGINES

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("drafter", metavar="DRAFTER", help="path or Hub id of a head, a model or an adapter")
    parser.add_argument("folder", metavar="FOLDER", help="where to write: a new folder")
    parser.add_argument("--to", required=True, choices=list(ENGINES), help="the engine; vLLM loads speculators too")
    parser.add_argument(
        "--target",
        required=True,
        metavar="MODEL",
        help="path or Hub id of the model that it drafts for; for a head only its config.json is read",
    )
    parser.add_argument(
        "--tokens", type=int, default=3, metavar="N", help="drafted a round, in that command (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    transformers.utils.logging.disable_progress_bar()
    serve = export_drafter(args.drafter, args.folder, args.to, args.target, args.tokens)
    print(f"{args.folder} is for {ENGINES[args.to]}; serve it with\n\n  {serve}")
    return 0
