"""One pair of models: all methods interleaved in one run, medians of paired ratios with intervals, every text checked.

python -m benchmarks suites                                # all methods on the bundled pair
python -m benchmarks suites short                          # with claims that pass or fail
python -m benchmarks suites --target me/large --drafter me/small --prompts prompts.jsonl --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from benchmarks.methods import K_MATRIX, METHODS, Setup
from benchmarks.render import machine, plot, save, table
from benchmarks.suites import SUITES, Outcome, Work, methods_suite
from csdraft.bench import Prompt, configured
from csdraft.data.text import read_objects
from csdraft.progress import Progress
from csdraft_command import COUNT

__all__ = ["load_model", "main", "read_prompts"]

TARGET, DRAFTER = "models/smol-target", "models/smol-drafter"
PROMPTS, LONG_PROMPTS = "recipes/smol/prompts.jsonl", "recipes/smol/prompts_long.jsonl"
TUNE_PROMPTS = "recipes/smol/prompts_tune.jsonl"
SUITE_DEFAULTS: dict[str | None, dict[str, Any]] = {
    None: {},
    "short": {},
    "long": {"prompts": LONG_PROMPTS, "context": 2048},
    "random": {"max_new_tokens": 256},
    "batch": {},
    "overhead": {},
    "grid": {},
    "planner": {"max_new_tokens": 64},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEFAULTS = {"prompts": PROMPTS, "context": 0, "max_new_tokens": 128}


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:22}{function.__doc__}" for name, function in METHODS.items())
    suites = "\n".join(f"  {name:22}{function.__doc__}" for name, function in SUITES.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks suites",
        description=__doc__,
        epilog=f"methods:\n{listed}\n\nsuites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "suite", nargs="?", choices=[*SUITES], help="a fixed set of methods, with claims to pass or fail"
    )
    made.add_argument("--target", default=TARGET, help="path or Hub id (default: %(default)s)")
    made.add_argument("--drafter", default=DRAFTER, help="path or Hub id (default: %(default)s)")
    made.add_argument("--prompts", help=f'FILE.jsonl of {{"id", "prompt"}}, or a Hub data set (default: {PROMPTS})')
    made.add_argument(
        "--tune-prompts", default=TUNE_PROMPTS, help="for the suites grid and planner (default: %(default)s)"
    )
    made.add_argument("--limit", type=COUNT, help="use so many prompts at most")
    made.add_argument(
        "--context", type=COUNT, help="make every prompt so many tokens long, with the prompts before it"
    )
    made.add_argument("--methods", default="", help="names with commas between them (default: most)")
    made.add_argument("--depth", type=COUNT, default=5, help="of methods of fixed length (default: %(default)s)")
    made.add_argument("--k-matrix", type=json.loads, help="of the cascade [drafter, MaxGram], as JSON")
    made.add_argument("--max-new-tokens", type=COUNT, help="default: 128, suite random 256")
    made.add_argument("--ignore-eos", action="store_true", help="continue to the length asked for; suites always do")
    made.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    made.add_argument("--batch-size", type=COUNT, default=1)
    made.add_argument("--repetitions", type=COUNT, default=3)
    made.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    made.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for trials on a busy machine")
    made.add_argument("--threads", type=COUNT, help="of torch on the CPU (default: all cores)")
    made.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON and SVG")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the exit status is 0 if every claim passed."""
    options = parser().parse_args(argv)
    for key, value in (DEFAULTS | SUITE_DEFAULTS[options.suite]).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    about = {"machine": machine(device, dtype), "settings": settings(options)}
    progress = Progress()
    setup, prompts, tune = None, [], []
    if options.suite != "overhead":
        tokenizer = load_tokenizer(options.target)
        setup = load(options, tokenizer, device)
        prompts = tokenized(tokenizer, read_prompts(options.prompts, options.limit), options.context)
        if options.suite in ("grid", "planner"):
            tune = tokenized(tokenizer, read_prompts(options.tune_prompts, options.limit), options.context)
    methods = [name for name in options.methods.split(",") if name]
    greedy = options.temperature == 0
    work = Work(setup, prompts, tune, methods, options.repetitions, options.batch_size, greedy, progress)
    outcome = (SUITES[options.suite] if options.suite else methods_suite)(work)
    show(options, about, outcome)
    return 0 if all(claim.passed for claim in outcome.claims) else 1


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they were used; models and files by the last part of their path."""
    kept = {key: value for key, value in vars(options).items() if key != "out"}
    for key in ("target", "drafter", "prompts", "tune_prompts"):
        kept[key] = name_of_path(kept[key])
    return kept


def name_of_path(path: str) -> str:
    """A Hub id as it is; of a folder the last part."""
    return Path(path).resolve().name if Path(path).exists() else path


def show(options: argparse.Namespace, about: dict[str, Any], outcome: Outcome) -> None:
    """Prints the outcome and writes its files."""
    where, used = about["machine"], about["settings"]
    title = f"{used['target']} with {used['drafter']}" if options.suite != "overhead" else "csdraft"
    print(f"{title}: {where['cpu'] if where['device'] == 'cpu' else where['device']}, {where['threads']} threads, "
          f"{where['dtype']}, {options.max_new_tokens} new tokens, {options.clock} time")  # fmt: skip
    if (where["load_before"] or 0) > 0.5:
        print(f"NOT A QUIET MACHINE: load {where['load_before']} before this run; trust the ratios only, and little")
    for text in outcome.notes:
        print(f"\n{text}")
    if outcome.figures:
        print(f"\n{table(outcome.figures)}")
    print()
    for claim in outcome.claims:
        print(claim)
    name = options.suite or "bench"
    save(options.out / f"{name}.json", about | outcome.extra, outcome.figures, outcome.run, outcome.claims)
    written = f"{options.out / name}.json"
    if outcome.figures:
        plot(options.out / f"{name}.svg", outcome.figures, title)
        written += f" and {name}.svg"
    print(f"\nwritten: {written}")


def load(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Setup:
    """The models and what every `generate` gets."""
    dtype = getattr(torch, options.dtype)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    changes = {"pad_token_id": pad} | ({"eos_token_id": None} if options.ignore_eos or options.suite else {})
    target = configured(load_model(options.target, device, dtype), **changes)
    drafter = load_model(options.drafter, device, dtype)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    generate = {
        "max_new_tokens": options.max_new_tokens,
        **(sampling if options.temperature else {"do_sample": False}),
    }
    return Setup(
        target,
        generate,
        CLOCKS[options.clock],
        drafter=drafter,
        depth=options.depth,
        k_matrix=options.k_matrix or K_MATRIX,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a path or Hub id; SystemExit with the way out if there is none."""
    if path == TARGET and not Path(path).exists():  # or it would be looked up on the Hub
        raise SystemExit(
            f"no folder {path!r} here: run from the repository, or name models with --target and --drafter"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no tokenizer at {path!r}; --target names a model with one, by path or Hub id") from error


def load_model(path: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM or T5-like model, ready to generate; SystemExit with the way out if there is none."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise SystemExit(f"no model at {path!r} ({str(error).splitlines()[0]}); name one by path or Hub id") from error
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device).eval()  # type: ignore[arg-type]


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """The `prompt` column of a JSON lines file or of a Hub data set's train split."""
    if Path(source).exists():
        try:
            prompts: list[Any] = [row.get("prompt") for row in read_objects(source, limit)]
        except ValueError as error:
            raise SystemExit(str(error)) from error
    elif source.endswith((".jsonl", ".json")):
        raise SystemExit(f'no prompts at {source!r}; give --prompts a file with {{"id", "prompt"}} on each line')
    else:
        from datasets import load_dataset

        prompts = list(load_dataset(source, split="train")["prompt"])
    if not prompts:
        raise SystemExit(f"{source!r} holds no prompt")
    prompts = prompts[:limit]
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise SystemExit(f"row {number} of {source!r} has {prompt!r} as prompt; give a text there, or remove it")
    return prompts


def tokenized(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int = 0) -> list[Prompt]:
    """Token ids of each prompt; with a `length`, those before it go in front, and all is cut to it at the left."""
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    made = []
    for place, own in enumerate(ids):
        text, before = own, place
        while len(text) < length:
            before -= 1
            text = ids[before % len(ids)] + text
        made.append(tuple(text[-length:]))
    return made
