"""Every method of the folders on one pair of models: tokens a round and speed, for the table of methods.

Drafters, trees and schedules decode greedily, drafters and trees at their own lengths every round; verifiers sample at
temperature 1, each with the drafts that it is for. A method that a user must bring something for (documents, a
tokenizer) is left out unless it is given, or MAKE says how to make one from the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from csdraft import spec
from csdraft.bench.figures import ratio
from csdraft.bench.measure import Cell, Prompt, measure
from csdraft.bench.methods import Method, Setup
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter, Schedule
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.merged import Merged
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.drafters.vertical import Vertical
from csdraft.schedules.fixed import Fixed

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
