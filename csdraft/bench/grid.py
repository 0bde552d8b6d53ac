"""Chooses the lengths of single drafters and the K matrix of a cascade by trying them all on tuning prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from csdraft.bench.measure import Cell, Prompt, measure
from csdraft.bench.methods import Method, Setup
from csdraft.cascade import CascadeDrafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.schedules.fixed import Fixed

__all__ = ["Choice", "grid_search"]

DRAFTER_LENGTHS = (1, 2, 3, 4, 6, 8)
MAX_GRAM_LENGTHS = (2, 4, 6, 8, 12)
STAGE_LENGTHS, TAIL_LENGTHS, INNER_LENGTHS = (1, 2, 4, 6), (0, 4, 8), (0, 2, 4, 8)
"""Of the cascade: k[0][0], k[0][1] and k[1][1]."""


@dataclass(frozen=True)
class Choice:
    """What the search chose.

    Attributes:
        rates: tokens a second on the tuning prompts, by candidate.
        k_matrix: the best.
        finalists: the methods to compare on other prompts, plain first.
        singles: the names of those with one drafter; `cascade` that of the cascade.
        table: all candidates, to print.
    """

    rates: dict[str, float]
    k_matrix: list[list[int]]
    finalists: list[Method]
    singles: list[str]
    cascade: str
    table: str


def grid_search(setup: Setup, prompts: Sequence[Prompt], progress: Callable[..., None]) -> Choice:
    """Tries every candidate on every prompt once, interleaved, and takes those with the most tokens a second."""
    drafters = {f"drafter {n}": single(ModelDrafter(setup.drafter), n) for n in DRAFTER_LENGTHS}
    drafters["drafter default"] = {"assistant": ModelDrafter(setup.drafter)}
    max_grams = {f"max_gram {n}": single(MaxGram(), n) for n in MAX_GRAM_LENGTHS}
    max_grams["max_gram default"] = {"assistant": MaxGram()}
    matrices = [[[a, b], [0, c]] for a, b, c in product(STAGE_LENGTHS, TAIL_LENGTHS, INNER_LENGTHS) if b or c]
    cascades = {f"cascade {matrix}": cascade(setup, matrix) | {"schedule": Fixed()} for matrix in matrices}

    rates = tokens_per_second(setup, drafters | max_grams | cascades, prompts, progress)
    best_matrix = matrices[[*cascades].index(best(rates, cascades))]
    with_default = {f"cascade {best_matrix} default": cascade(setup, best_matrix)}
    fixed = {name: cascades[name] for name in [f"cascade {best_matrix}"]}
    again = tokens_per_second(setup, fixed | with_default, prompts, progress)
    rates |= {name: again[name] for name in with_default}
    chosen = best(again, again)
    singles = {
        name: options
        for family in (drafters, max_grams)
        for name, options in family.items()
        if name in (best(rates, family), [*family][-1])
    }
    finalists = {"plain": {}} | singles | fixed | with_default
    methods = [Method(name, options) for name, options in finalists.items()]
    return Choice(rates, best_matrix, methods, [*singles], chosen, table(rates, chosen))


def single(drafter: Any, depth: int) -> dict[str, Any]:
    return {"assistant": drafter, "schedule": Fixed(depth)}


def cascade(setup: Setup, k_matrix: list[list[int]]) -> dict[str, Any]:
    return {"assistant": CascadeDrafter([setup.drafter, MaxGram()], k_matrix=k_matrix)}


def best(rates: dict[str, float], names: dict[str, Any] | dict[str, float]) -> str:
    return max(names, key=lambda name: rates[name])


def tokens_per_second(
    setup: Setup, candidates: dict[str, dict[str, Any]], prompts: Sequence[Prompt], progress: Callable[..., None]
) -> dict[str, float]:
    """Of each candidate, over all prompts."""
    cells = [Cell(Method(name, options)) for name, options in candidates.items()]
    run = measure(setup, cells, prompts, 1, lambda what, share: progress("grid search", share), look=False)
    tokens = {name: sum(s.tokens for s in run.samples if s.cell == name) for name in candidates}
    return {name: tokens[name] / sum(s.seconds for s in run.samples if s.cell == name) for name in candidates}


def table(rates: dict[str, float], chosen: str) -> str:
    """All candidates, the fastest first."""
    ranked = sorted(rates, key=lambda name: -rates[name])
    lines = [f"{rates[name]:10,.1f}  {name}{'  <- chosen' if name == chosen else ''}" for name in ranked]
    return "\n".join(["grid search on the tuning prompts, tokens/s (K matrix of [drafter, MaxGram]):", *lines])
