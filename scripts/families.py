"""Every decoder family of transformers, decoded plainly and with drafts: `make families` writes docs/families.md.

    python -m scripts.families --out results.jsonl            # the sweep; what is there already is not done again
    python -m scripts.families --only LlamaForCausalLM        # one class, printed

Each class runs in a process of its own, with a time and a memory limit: a crash or a hang is a row of the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.compare import examine

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
)
SECONDS, GIGABYTES = 120, 12


def classes() -> dict[str, tuple[str, str]]:
    """Name in the table -> (model class, model type); each pair of model and config class once."""
    pairs: dict[tuple[str, str], str] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping + "_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                pairs.setdefault((name, CONFIG_MAPPING[model_type].__name__), model_type)
    found: dict[str, tuple[str, str]] = {}
    for (name, _), model_type in pairs.items():
        found[name if name not in found else f"{name} ({model_type})"] = (name, model_type)
    return found


def examined(name: str, model_type: str) -> dict[str, Any]:
    """The row of a class."""
    try:
        model_class = getattr(transformers, name)
    except (ImportError, AttributeError) as error:
        return {"result": "skipped", "reason": f"cannot be imported: {error}"[:200]}
    return examine(model_class, CONFIG_MAPPING[model_type])


def work(pair: tuple[str, str], answer: Connection) -> None:
    """The child: one class."""
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    silent = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    answer.send(examined(*pair))


def sweep(names: list[str], workers: int, out: Path) -> None:
    """Examines these classes and appends one JSON line for each."""
    context, known = multiprocessing.get_context("fork"), classes()
    running: dict[Connection, tuple[str, Any, float]] = {}
    waiting, done, began = list(names), 0, time.time()
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(known[name], theirs))
            process.start()
            theirs.close()
            running[mine] = (name, process, time.time())
        ready = wait(list(running), timeout=1.0)
        for pipe, (name, process, started) in list(running.items()):
            if pipe not in ready and time.time() - started < SECONDS:
                continue
            row = answer_of(pipe, process, pipe in ready)
            del running[pipe]
            done += 1
            row = {"name": name, "model_type": known[name][1], "seconds": round(time.time() - started, 1), **row}
            row |= {"transformers": transformers.__version__, "torch": torch.__version__}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.time() - began) / done * (len(waiting) + len(running))
            print(f"{done}/{len(names)} {row['result']:9} {name} {row['seconds']} s; {left / 60:.0f} min left", flush=True)


def answer_of(pipe: Connection, process: Any, ready: bool) -> dict[str, Any]:
    """What the child said, or how it ended."""
    row: dict[str, Any] = {"result": "error", "reason": f"no answer within {SECONDS} s"}
    if ready:
        try:
            row = pipe.recv()
        except EOFError:
            process.join()
            row["reason"] = f"the process ended by itself with {process.exitcode}"
    process.kill()
    process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--only", nargs="*", help="names of classes; printed, not kept")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        for name in arguments.only:
            print(json.dumps({"name": name, **examined(*classes()[name])}, indent=1))
        return
    had = {json.loads(line)["name"] for line in arguments.out.open()} if arguments.out.exists() else set()
    sweep([name for name in classes() if name not in had], arguments.workers, arguments.out)


if __name__ == "__main__":
    main()
