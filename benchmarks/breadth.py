"""Every method of the folders on one pair of models: tokens a round and speed, for the table of methods.

Drafters, trees and schedules decode greedily, drafters and trees at their own lengths every round; verifiers sample at
temperature 1, each with the drafts that it is for. A method that a user must bring something for (documents, a
tokenizer) is left out unless it is given, or MAKE says how to make one from the pair.
The command brings documents (the standard library's), a stop head that it trains on other prompts, and for another
tokenizer the drafter's own, so that only the way there and back is added.

    python -m benchmarks methods --limit 12 --out docs/figures/methods.json && python docs/build_tables.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.measure import measure
from benchmarks.methods import Setup
from benchmarks.pair import read_prompts, tokenized
from csdraft import spec
from csdraft.bench import Cell, Method, Prompt, configured, encode, ratio
from csdraft.cascade import CascadeDrafter
from csdraft.data.sources import read_rows
from csdraft.decoding.interfaces import Drafter, Schedule
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.merged import Merged
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.drafters.reference import Reference
from csdraft.drafters.translated import Translated
from csdraft.drafters.vertical import Vertical
from csdraft.progress import Progress
from csdraft.schedules.fixed import Fixed
from csdraft.schedules.stop_head import StopHead
from csdraft.tables.corpus import CorpusIndex
from csdraft.trainers.stop_head import fit, harvest
from csdraft_command import COUNT

__all__ = ["GREEDY", "SAMPLED", "breadth"]

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
CASCADE = "CascadeDrafter, default schedule"

MAKE: Mapping[str, Callable[[Setup], Drafter]] = {
    "model": lambda setup: ModelDrafter(setup.drafter),
    "vertical": lambda setup: Vertical(setup.drafter, MaxGram(depth=4), depth=4),
    "horizontal": lambda setup: Horizontal((ModelDrafter(setup.drafter), MaxGram()), (2, 8)),
    "merged": lambda setup: Merged((ModelDrafter(setup.drafter), MaxGram())),
    "ouroboros": lambda setup: Ouroboros(ModelDrafter(setup.drafter)),
}
"""Drafters that do not come with their defaults."""
TREES = {"without_replacement": "recursive", "k_seq": "sampled", "spec_hub": "pairs", "traversal": "recursive"}
"""What verifiers for several drafts a place are shown; all others judge chains."""
NONE: Mapping[str, Any] = MappingProxyType({})


def breadth(
    setup: Setup,
    prompts: Sequence[Prompt],
    repetitions: int,
    progress: Callable[[str, float], None],
    given: Mapping[str, Drafter | Schedule] = NONE,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By family and type: `tokens` a round, and `speedup` over plain `generate` as median, low, high.

    Args:
        given: drafters and schedules by their type, which stand for those that the pair alone would make.
    """
    greedy: dict[tuple[str, str], dict[str, Any]] = {}
    greedy["drafters", CASCADE] = {"assistant": CascadeDrafter([setup.drafter, MaxGram()], setup.k_matrix)}
    for type in spec.types("drafters"):
        if (drafter := given.get(type) or made(type, setup)) is not None:
            greedy["drafters", type] = {"assistant": drafter, "schedule": Fixed()}
    for type in spec.types("trees"):
        greedy["trees", type] = {"assistant": branching(type, setup), "schedule": Fixed()}
    for type in spec.types("schedules"):
        greedy["schedules", type] = {"assistant": ModelDrafter(setup.drafter), "schedule": given.get(type, type)}
    sampled = {}
    for type in spec.types("verifiers"):
        drafter = branching(TREES[type], setup) if type in TREES else ModelDrafter(setup.drafter)
        sampled["verifiers", type] = {"assistant": drafter, "verifier": type, "schedule": Fixed()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for options, methods in ((GREEDY, greedy), (SAMPLED, sampled)):
        own = replace(setup, options=setup.options | options)
        cells = [Cell(Method("plain", {}))] + [Cell(Method("/".join(name), how)) for name, how in methods.items()]
        run = measure(own, cells, prompts, repetitions, progress)
        for family, type in methods:
            cell = f"{family}/{type}"
            looks = [look for look in run.looks if look.cell == cell]
            rounds = sum(look.report.rounds for look in looks if look.report is not None)
            tokens = sum(look.tokens for look in looks) / rounds
            found.setdefault(family, {})[type] = {
                "tokens": round(tokens, 3),
                "speedup": list(ratio(run, cell, "plain")),
            }
    return found


def made(type: str, setup: Setup) -> Drafter | None:
    """The drafter with its defaults or as MAKE says; None if it needs more than the pair."""
    if type in MAKE:
        return MAKE[type](setup)
    try:
        return spec.find("drafters", type)()
    except (TypeError, ValueError):  # a required option, or one that its defaults do not fill
        return None


def branching(type: str, setup: Setup) -> ModelDrafter:
    return ModelDrafter(setup.drafter, tree=spec.find("trees", type)())


def trained_stop_head(setup: Setup, tokenizer: Any, prompts: list[str]) -> StopHead:
    """Trained on how the target judges the drafter after these prompts."""
    batches = [encode(setup, [prompt]) for prompt in tokenized(tokenizer, prompts)]
    return StopHead(fit(harvest(setup.target, ModelDrafter(setup.drafter), batches, **setup.options)))


def main(argv: Sequence[str]) -> None:
    """Measures, and writes what docs/build_tables.py reads."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="models/smol-target")
    parser.add_argument("--drafter", default="models/smol-drafter")
    parser.add_argument("--prompts", default="recipes/smol/prompts.jsonl")
    parser.add_argument(
        "--tune-prompts", default="recipes/smol/prompts_tune.jsonl", help="that the stop head learns from"
    )
    parser.add_argument("--documents", type=COUNT, default=150, help="to look things up in (default: %(default)s)")
    parser.add_argument("--limit", type=COUNT, default=12, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=COUNT, default=64)
    parser.add_argument("--repetitions", type=COUNT, default=2)
    parser.add_argument("--threads", type=COUNT, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/methods.json"))
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.target, trust_remote_code=False)
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
        for path in (options.target, options.drafter)
    )
    target = configured(target, pad_token_id=tokenizer.eos_token_id, eos_token_id=None)
    setup = Setup(target, {"max_new_tokens": options.max_new_tokens}, drafter=drafter)
    documents = [row["input_ids"] for row in read_rows("stdlib", tokenizer, 1 << 20, limit=options.documents)]
    given = {
        "datastore": Datastore(CorpusIndex.build(documents)),
        "reference": Reference(documents),
        "translated": Translated(ModelDrafter(drafter), tokenizer, tokenizer),
        "stop_head": trained_stop_head(setup, tokenizer, read_prompts(options.tune_prompts)),
    }
    prompts = tokenized(tokenizer, read_prompts(options.prompts, options.limit))
    found = breadth(setup, prompts, options.repetitions, Progress(), given)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "threads": options.threads}
    options.out.write_text(json.dumps({"settings": settings, "methods": found}, indent=1) + "\n")
    print(f"written: {options.out}")
