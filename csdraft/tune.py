"""From drafters and prompts to a cascade: what is expected of the best K matrices, then what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csdraft.bench import Cell, Method, Prompt, Setup, encode, measure
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.metrics.intervals import Interval, bootstrap_median
from csdraft.planner.expect import Expectation
from csdraft.planner.search import Plan, alternatives, search
from csdraft.planner.trace import observe_world

__all__ = ["Candidate", "preferred", "tune"]

SCHEDULES = ("cost_model", "fixed")
AS_GOOD = 0.97
"""Share of the best speed-up that a clock cannot tell from it."""


@dataclass(frozen=True)
class Candidate:
    """A cascade that was planned and timed.

    Attributes:
        kept: the drafters it uses, by their place in what was given.
        k_matrix: of those.
        options: lenience and schedule.
        expected: with the whole matrix every round and lenience 1.
        measured: speed-up over plain `generate`, median over prompts and repetitions, paired.
        cascade: itself, with the report of what was timed.
    """

    kept: Sequence[int]
    k_matrix: list[list[int]]
    options: Mapping[str, Any]
    expected: Expectation
    measured: Interval
    cascade: CascadeDrafter


def tune(
    target: Any,
    drafters: Sequence[Drafter],
    prompts: Sequence[Prompt],
    finalists: int = 4,
    leniences: Sequence[float] = (1.0, 2.0),
    repetitions: int = 2,
    progress: Callable[[str, float], None] = lambda what, share: None,
    **options: Any,
) -> list[Candidate]:
    """Plans on all prompts, then times the best plan of each set of drafters against plain `generate`, interleaved.

    Args:
        target: the model.
        drafters: largest first; of those that do not pay none is kept.
        prompts: token ids.
        finalists: plans to time, each under the cost model and under the whole matrix every round.
        leniences: of inner reviewers, to try on plans that have some.
        repetitions: timed passes.
        progress: called with what is going on and the share that is done.
        options: of `generate`.

    Returns:
        The candidates, the fastest measured first.
    """
    setup = Setup(target, options)
    encoded = [encode(setup, [prompt]) for prompt in prompts]
    world = observe_world(target, drafters, encoded, progress, **options)
    plans = alternatives(search(world), finalists)
    made = {
        f"{n}": (plan, extra, CascadeDrafter([drafters[j] for j in plan.kept], k_matrix=plan.trimmed(), **extra))
        for n, (plan, extra) in enumerate(variants(plans, leniences))
    }
    cells = [Cell(Method("plain", {}))]
    cells += [Cell(Method(name, {"assistant": cascade})) for name, (_, _, cascade) in made.items()]
    run = measure(setup, cells, prompts, repetitions, progress)
    times = {(s.cell, s.group, s.repetition): s.seconds for s in run.samples}
    places = range(len({s.group for s in run.samples}))
    candidates = []
    for name, (plan, extra, cascade) in made.items():
        ratios = [[times["plain", g, r] / times[name, g, r] for r in range(repetitions)] for g in places]
        measured = bootstrap_median(ratios)
        candidates.append(Candidate(plan.kept, plan.trimmed(), extra, plan.expected, measured, cascade))
    return sorted(candidates, key=lambda candidate: -candidate.measured.median)


def preferred(found: Sequence[Candidate]) -> Candidate:
    """The fastest; of those that are as good, one that is strict, and leaves lengths to the cost model."""
    bar = AS_GOOD * max(candidate.measured.median for candidate in found)
    return min(
        (candidate for candidate in found if candidate.measured.median >= bar),
        key=lambda c: (c.options["lenience"] > 1, c.options["schedule"] != SCHEDULES[0], -c.measured.median),
    )


def variants(plans: Sequence[Plan], leniences: Sequence[float]) -> list[tuple[Plan, dict[str, Any]]]:
    """Every plan with each schedule, and with each lenience where somebody reviews."""
    made = []
    for plan in plans:
        reviews = any(any(row) for row in plan.trimmed()[1:])
        for lenience in leniences if reviews else (1.0,):
            made += [(plan, {"lenience": lenience, "schedule": schedule}) for schedule in SCHEDULES]
    return made
