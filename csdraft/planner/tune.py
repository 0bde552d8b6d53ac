"""From drafters and prompts to a cascade: what is expected of the best K matrices, then what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csdraft.bench.measure import Cell, Prompt, encode, measure
from csdraft.bench.methods import Method, Setup
from csdraft.bench.statistics import Interval, bootstrap_median
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.planner.expect import Expectation
from csdraft.planner.search import Plan, alternatives, search
from csdraft.planner.trace import observe_world

__all__ = ["Candidate", "tune"]

SCHEDULES = ("cost_model", "fixed")


@dataclass(frozen=True)
class Candidate:
    """A cascade that was planned and timed.

    Attributes:
        kept: the drafters it uses, by their place in what was given.
        k_matrix: of those.
        options: lenience and schedule.
        expected: with the whole matrix every round and lenience 1.
        measured: speed-up over plain `generate`, median over prompts and repetitions, paired.
    """

    kept: Sequence[int]
    k_matrix: list[list[int]]
    options: Mapping[str, Any]
    expected: Expectation
    measured: Interval

    def cascade(self, drafters: Sequence[Drafter]) -> CascadeDrafter:
        """The cascade itself, out of the drafters that were given."""
        return CascadeDrafter([drafters[j] for j in self.kept], k_matrix=self.k_matrix, **self.options)


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
    setup = Setup(target, target, options=options)
    encoded = [encode(setup, [prompt]) for prompt in prompts]
    world = observe_world(target, drafters, encoded, progress, **options)
    plans = alternatives(search(world), finalists)
    made = {f"{n}": plan for n, plan in enumerate(variants(plans, leniences))}
    cells = [Cell(Method("plain", {}))]
    for name, (plan, extra) in made.items():
        cascade = CascadeDrafter([drafters[j] for j in plan.kept], k_matrix=plan.trimmed(), **extra)
        cells.append(Cell(Method(name, {"assistant": cascade})))
    run = measure(setup, cells, prompts, repetitions, progress, look=False)
    times = {(s.cell, s.group, s.repetition): s.seconds for s in run.samples}
    places = range(len({s.group for s in run.samples}))
    candidates = []
    for name, (plan, extra) in made.items():
        ratios = [[times["plain", g, r] / times[name, g, r] for r in range(repetitions)] for g in places]
        candidates.append(Candidate(plan.kept, plan.trimmed(), extra, plan.expected, bootstrap_median(ratios)))
    return sorted(candidates, key=lambda candidate: -candidate.measured.median)


def variants(plans: Sequence[Plan], leniences: Sequence[float]) -> list[tuple[Plan, dict[str, Any]]]:
    """Every plan with each schedule, and with each lenience where somebody reviews."""
    made = []
    for plan in plans:
        reviews = any(any(row) for row in plan.trimmed()[1:])
        for lenience in leniences if reviews else (1.0,):
            made += [(plan, {"lenience": lenience, "schedule": schedule}) for schedule in SCHEDULES]
    return made
