"""Say what machine this is, whether versions fit, and what csdraft can do with your models.

Of each model: whether its text stays the same with drafts, whether its forwards are recorded and replayed, how long a
forward of 1, 4, 8 and 16 tokens takes, and whether wide drafts pay. The exit status is 1 if a version is out of
bounds, or a model cannot be loaded or decoded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
import transformers

from csdraft.cli._models import DTYPES, SHORT
from csdraft.doctor import Machine, ModelState, Package, examine, machine, packages
from csdraft.models import load_model
from csdraft.progress import Progress

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="path or Hub id of a model, target or drafter")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the models; their own by default")
    parser.add_argument("--device", default="cpu", help="of the models: cpu (default), cuda, cuda:1, mps, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    here, versions = machine(), packages()
    models = [_examined(name, args) for name in args.models]
    print(_json(here, versions, models) if args.json else _page(here, versions, models))
    wrong = [one for one in versions if not one.fits] or [one for one in models if one.refused is not None]
    return 1 if wrong else 0


def _examined(name: str, args: argparse.Namespace) -> ModelState:
    try:
        model = load_model(name, dtype=SHORT.get(args.dtype) or args.dtype).to(args.device)
    except (OSError, ValueError) as error:
        return ModelState(name, "cannot be loaded", refused=" ".join(str(error).split()))
    return examine(name, model, Progress())


def _page(here: Machine, versions: list[Package], models: list[ModelState]) -> str:
    parts = ["Machine", str(here), "", "Versions", *map(str, versions)]
    for model in models:
        parts += ["", str(model)]
    if not models:
        parts += ["", "Name models to examine them: csdraft doctor MODEL ..."]
    return "\n".join(parts)


def _json(here: Machine, versions: list[Package], models: list[ModelState]) -> str:
    document = {
        "machine": asdict(here) | {"bfloat16": here.bfloat16},
        "versions": [asdict(one) for one in versions],
        "models": [one.as_json() for one in models],
    }
    return json.dumps(document, indent=2)
