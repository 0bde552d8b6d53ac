"""`k_matrix="auto"`: plans on one prompt at the first call with a target, and prints one line about the plan."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import name_of
from csdraft.planner.search import Plan, search
from csdraft.planner.trace import measure_drafters
from csdraft.reports.report import Planned

__all__ = ["plan_on"]

TOKENS = 48
"""Tokens that the target writes, twice, to make a plan."""


def plan_on(
    target: Any, drafters: Sequence[Drafter], names: Sequence[str], input_ids: torch.Tensor, options: Mapping[str, Any]
) -> tuple[Plan, Planned]:
    """The best plan for a target on one prompt, and its expected figures; prints one line about it on stderr.

    Args:
        target: the model.
        drafters: largest first.
        names: the drafters' names, for the printed line.
        input_ids: (1, length) token ids of the prompt, without padding.
        options: options of `generate`.
    """
    started = time.perf_counter()
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.random.fork_rng(devices=[]):  # planning must not change the later samples
        measured = measure_drafters(target, drafters, [prompt] * 2, max_new_tokens=TOKENS, **options)
    best = search(measured)[0]
    kept, expected = [names[j] for j in best.kept], best.expected
    plain = sum(trace.plain for trace in measured.traces) / sum(trace.length for trace in measured.traces)
    planned = Planned(kept, best.trimmed(), expected.tokens_per_round, expected.speedup, plain)
    print(
        f'csdraft: k_matrix="auto" was planned for {name_of(target)} in {time.perf_counter() - started:.1f} s: '
        f"{best.trimmed()} of {', '.join(kept)}, {expected.speedup:.2f} x plain expected; "
        "cascade.plan.save_pretrained(PATH) keeps it",
        file=sys.stderr,
    )
    return best, planned
