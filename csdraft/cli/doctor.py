"""`csdraft doctor`: describes the machine, the versions and the named models."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from csdraft.cli._models import use_machine
from csdraft.doctor import ModelState, examine, machine, packages
from csdraft.models import load_model
from csdraft.progress import Progress

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    use_machine(args)
    here, versions = machine(), packages()
    models = [_examined(name, args) for name in args.models]
    if args.json:
        document = {
            "machine": here,
            "versions": [asdict(package) for package in versions],
            "models": [asdict(model) | {"expected": model.expected} for model in models],
        }
        print(json.dumps(document, indent=2))
    else:
        shown = {topic: (", ".join(v) or "none") if isinstance(v, list) else v for topic, v in here.items()}
        lines = [f"{topic:<16} {value}" for topic, value in shown.items()]
        print("\n".join(["Machine", *lines, "", "Versions", *map(str, versions)]))
        for part in models or ["Name models to examine them: csdraft doctor MODEL ..."]:
            print(f"\n{part}")
    good = all(package.fits for package in versions) and all(model.refused is None for model in models)
    return 0 if good else 1


def _examined(name: str, args: argparse.Namespace) -> ModelState:
    try:
        model = load_model(name, dtype=args.dtype).to(args.device)
    except (OSError, ValueError) as error:
        return ModelState(name, "cannot be loaded", refused=" ".join(str(error).split()))
    return examine(name, model, Progress())
