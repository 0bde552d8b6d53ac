"""The K matrix with the greatest expected speed-up: which drafters to use, and how much each drafts.

`plan_on` plans on one prompt, at the first call with a target, for `k_matrix="auto"`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn

from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import name_of
from csdraft.decoding.traits import traits_of
from csdraft.kmatrix import KMatrix
from csdraft.models import base_model
from csdraft.planner.expect import Expectation, expect
from csdraft.planner.trace import Measured, measure_drafters
from csdraft.reports.report import Planned

__all__ = ["Plan", "alternatives", "plan_on", "search"]

FEW = 1500
"""Up to this many matrices are all replayed, which takes seconds."""


@dataclass(frozen=True)
class Plan:
    """A K matrix and its expected figures."""

    k_matrix: KMatrix
    expected: Expectation

    @property
    def kept(self) -> list[int]:
        """The indices of the drafters that it uses."""
        return sorted({j for row in self.k_matrix for j, k in enumerate(row) if k})

    def trimmed(self) -> list[list[int]]:
        """The matrix with rows and columns of the kept drafters only."""
        kept = self.kept
        rows = [self.k_matrix[0], *(self.k_matrix[j + 1] for j in kept[:-1])]
        return [[row[j] for j in kept] for row in rows]


def search(measured: Measured, over: Callable[[], bool] = lambda: False) -> list[Plan]:
    """All matrices that were tried, the fastest first.

    If there are few, as for two drafters, all are tried. A greedy search then starts from each drafter alone at its
    best length, and changes the entry that helps most until none helps. That takes a few hundred replays; a grid over
    three drafters would need a million.

    Args:
        over: whether the time is up; then the search ends with what it has found.
    """
    seen: dict[KMatrix, Expectation] = {}

    def speed(k_matrix: KMatrix) -> float:
        if k_matrix not in seen:
            seen[k_matrix] = expect(k_matrix, measured)
        return seen[k_matrix].speedup

    size = len(measured.drafters)
    nothing = ((0,) * size,) * size
    grid = {(i, j): (0, *measured.depths[j]) for i, j in entries(measured)}
    if prod(map(len, grid.values())) <= FEW:
        for lengths in product(*grid.values()):
            k_matrix = cleaned(changed(nothing, dict(zip(grid, lengths, strict=True))))
            if any(k_matrix[0]):
                speed(k_matrix)
                if over():
                    break
    for j in range(size):
        best = max((changed(nothing, {(0, j): k}) for k in measured.depths[j]), key=speed)
        while not over():
            better = max(neighbours(best, measured), key=speed)
            if speed(better) <= speed(best):
                break
            best = better
    ranked = sorted(seen, key=lambda k_matrix: -seen[k_matrix].speedup)
    return [Plan(k_matrix, seen[k_matrix]) for k_matrix in ranked]


def entries(measured: Measured) -> Iterator[tuple[int, int]]:
    """(row, column) of the entries of a K matrix that may be above 0: only models that write tokens can review."""
    size = len(measured.drafters)
    return ((i, j) for i in range(size) for j in range(i, size) if i == 0 or measured.models[i - 1])


def neighbours(k_matrix: KMatrix, measured: Measured) -> Iterator[KMatrix]:
    """The matrices that differ from `k_matrix` in one entry."""
    for i, j in entries(measured):
        for k in (0, *measured.depths[j]):
            other = cleaned(changed(k_matrix, {(i, j): k}))
            if any(other[0]):
                yield other


def changed(k_matrix: KMatrix, values: Mapping[tuple[int, int], int]) -> KMatrix:
    """The same matrix with other values in some entries, by (row, column)."""
    return tuple(tuple(values.get((i, j), k) for j, k in enumerate(row)) for i, row in enumerate(k_matrix))


def cleaned(k_matrix: KMatrix) -> KMatrix:
    """The same matrix with 0 in the rows of reviewers that are not used."""
    rows = [k_matrix[0]]
    for i in range(1, len(k_matrix)):
        asked = any(row[i - 1] for row in rows[:i])
        rows.append(k_matrix[i] if asked else (0,) * len(k_matrix))
    return tuple(rows)


def alternatives(plans: Sequence[Plan], most: int) -> list[Plan]:
    """The best plan of each set of drafters and reviewers, the fastest first, at most `most`."""
    best: dict[tuple, Plan] = {}
    for plan in plans:
        reviews = tuple(bool(any(row)) for row in plan.k_matrix[1:])
        best.setdefault((tuple(plan.kept), reviews), plan)
    return list(best.values())[:most]


TOKENS = 48
"""Tokens that the target writes, twice, to make a plan."""


def plan_on(
    target: Any, drafters: Sequence[Drafter], names: Sequence[str], input_ids: torch.Tensor, options: Mapping[str, Any]
) -> tuple[Plan, Planned]:
    """The best plan for a target on one prompt, and its expected figures; prints one line about it on stderr.

    Args:
        drafters, names: largest first.
        input_ids: (1, length) token ids of the prompt, without padding.
        options: of `generate`.
    """
    started = time.perf_counter()
    room = _fewest_positions([target, *(model for drafter in drafters for model in drafter.models())])
    tokens = min(TOKENS, room // 2)
    input_ids = input_ids[:, -min(room - tokens, input_ids.shape[1]) :]
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.random.fork_rng(devices=[]):  # planning must not change the later samples
        measured = measure_drafters(target, drafters, [prompt] * 2, max_new_tokens=tokens, **options)
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


def _fewest_positions(models: Sequence[object]) -> int:
    """The most tokens that all these models can read."""
    limits = [traits_of(base_model(model)).positions for model in models if isinstance(model, nn.Module)]
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)
