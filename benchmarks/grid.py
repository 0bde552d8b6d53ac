"""Chooses the lengths of single drafters and the K matrix of a cascade by trying them all on tuning prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.measure import measure
from benchmarks.methods import Setup
from csdraft.bench import Cell, Method, Prompt
from csdraft.cascade import CascadeDrafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.schedules.fixed import Fixed

__all__ = ["Choice", "grid_search"]

DRAFTER_LENGTHS = (1, 2, 3, 4, 6, 8)
MAX_GRAM_LENGTHS = (2, 4, 6, 8, 12, 16)
STAGE_LENGTHS, TAIL_LENGTHS, INNER_LENGTHS = (1, 2, 3, 4, 6), (8, 16, 24), (2, 4)
"""Of the cascade: k[0][0], k[0][1] and k[1][1]; with any 0 it would be another method."""
RETRIED = 4
"""Matrices that are tried once more, with their full lengths every round too: one pass is noisy, its best lucky."""


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


def grid_search(setup: Setup, prompts: Sequence[Prompt], repetitions: int, progress: Callable[..., None]) -> Choice:
    """Tries every candidate on every prompt once, interleaved, then the best of them again."""
    drafters = {f"drafter {n}": single(ModelDrafter(setup.drafter), n) for n in DRAFTER_LENGTHS}
    drafters["drafter default"] = {"assistant": ModelDrafter(setup.drafter)}
    max_grams = {f"max_gram {n}": single(MaxGram(), n) for n in MAX_GRAM_LENGTHS}
    max_grams["max_gram default"] = {"assistant": MaxGram()}
    matrices = {
        f"cascade {m}": m
        for m in ([[a, b], [0, c]] for a, b, c in product(STAGE_LENGTHS, TAIL_LENGTHS, INNER_LENGTHS))
    }
    cascades = {name: cascade(setup, matrix) for name, matrix in matrices.items()}
    rates = tokens_per_second(setup, drafters | max_grams | cascades, prompts, 1, progress)

    retried = ranked(rates, cascades)[:RETRIED]
    again = {name: cascades[name] for name in retried}
    again |= {f"{name} fixed": cascades[name] | {"schedule": Fixed()} for name in retried}
    second = tokens_per_second(setup, again, prompts, repetitions, progress)
    chosen = ranked(second, again)[0]
    matrix = matrices[chosen.removesuffix(" fixed")]
    singles = {}
    for family in (drafters, max_grams):
        for name in (ranked(rates, family)[0], [*family][-1]):
            singles[name] = family[name]
    finalists = [
        Method(name, options) for name, options in ({"plain": {}} | singles | {chosen: again[chosen]}).items()
    ]
    text = "\n\n".join([
        table("grid search on the tuning prompts, tokens/s (K matrix of [drafter, MaxGram])", rates),
        table(f"the best {len(retried)} matrices again, {repetitions} repetitions", second, chosen),
    ])  # fmt: skip
    return Choice({**rates, **second}, matrix, finalists, [*singles], chosen, text)


def single(drafter: Any, depth: int) -> dict[str, Any]:
    return {"assistant": drafter, "schedule": Fixed(depth)}


def cascade(setup: Setup, k_matrix: list[list[int]]) -> dict[str, Any]:
    return {"assistant": CascadeDrafter([setup.drafter, MaxGram()], k_matrix=k_matrix)}


def ranked(rates: dict[str, float], names: Iterable[str]) -> list[str]:
    """The names, the fastest first."""
    return sorted(names, key=lambda name: -rates[name])


def tokens_per_second(
    setup: Setup,
    candidates: dict[str, dict[str, Any]],
    prompts: Sequence[Prompt],
    repetitions: int,
    progress: Callable[..., None],
) -> dict[str, float]:
    """Of each candidate, over all prompts."""
    cells = [Cell(Method(name, options)) for name, options in candidates.items()]
    run = measure(setup, cells, prompts, repetitions, lambda what, share: progress("grid search", share), look=False)
    tokens = {name: sum(s.tokens for s in run.samples if s.cell == name) for name in candidates}
    return {name: tokens[name] / sum(s.seconds for s in run.samples if s.cell == name) for name in candidates}


def table(title: str, rates: dict[str, float], chosen: str = "") -> str:
    """All candidates, the fastest first."""
    lines = [f"{rates[name]:10,.1f}  {name}{'  <- chosen' if name == chosen else ''}" for name in ranked(rates, rates)]
    return "\n".join([f"{title}:", *lines])
