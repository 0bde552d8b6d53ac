"""Finds the best cascade of some drafters for a target and prompts, within a time limit.

There are three steps. First the target writes texts, and the drafters are compared with it (at most half of the
time). Then K matrices are replayed on these texts (at most 30 % of the rest). Last, the best plans are timed until the
time is up. If time is short, texts are shorter, and fewer prompts and plans are used. Each candidate says what was
timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from csdraft.bench import Cell, Method, Prompt, Run, Setup, encode, measure, ratio
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.metrics.intervals import Interval
from csdraft.planner.search import Plan, alternatives, search
from csdraft.planner.trace import Measured, measure_drafters

__all__ = ["Allowance", "Candidate", "preferred", "tune"]

SCHEDULES = ("cost_model", "fixed")
AS_GOOD = 0.97
"""Candidates with at least this share of the best speed-up count as equally fast."""
OBSERVING, SEARCHING = 0.5, 0.3
"""Shares of the remaining time for observing, and then for replaying."""
FEW_PROMPTS = 4
"""A plan is only timed if there is time for this many prompts."""
LENGTH = 96
"""Tokens of a text by default."""
SHORTEST = 16
"""The fewest tokens of a text."""
TRUSTED = 2.0
"""To plan the time, a plan counts as at most this many times as fast as plain decoding."""
ALMOST = 0.99
"""The largest share of the time that is reported before the end."""
LEAST_COMPARED = 3
"""With fewer prompts, no candidate is said to be slower than the fastest."""


@dataclass(frozen=True)
class Candidate:
    """A cascade that was planned and timed.

    Attributes:
        plan: its K matrix, and the figures expected of the whole matrix every round, at lenience 1.
        options: lenience and schedule.
        measured: speed-up over plain `generate`: the median over pairs of the same prompt and repetition.
        cascade: the cascade, with a report of the timed calls.
        prompts: how many were timed.
        repetitions: how often each at most.
        tokens: the greatest length of a text.
        behind: its time over the fastest candidate's, paired in the same way; 1 for the fastest itself.
    """

    plan: Plan
    options: Mapping[str, Any]
    measured: Interval
    cascade: CascadeDrafter
    prompts: int
    repetitions: int
    tokens: int
    behind: Interval

    @property
    def told_apart(self) -> bool:
        """Whether the measurements show that it is slower than the fastest."""
        return self.prompts >= LEAST_COMPARED and self.behind.low > 1


@dataclass
class Allowance:
    """Measures the time of work that has several parts.

    Args:
        seconds: the most that all parts together may take; infinity for no limit.
        say: called with the current task and the share of the time that has passed.
        now: the clock.
    """

    seconds: float
    say: Callable[[str, float], None]
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._started = self.now()

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return self.now() - self._started

    @property
    def remaining(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.seconds - self.passed, 0.0)

    def tell(self, what: str) -> None:
        """Reports the share of the time that has passed."""
        self.say(what, min(self.passed / self.seconds, ALMOST))


def tune(
    target: Any,
    drafters: Sequence[Drafter],
    prompts: Sequence[Prompt],
    finalists: int = 4,
    leniences: Sequence[float] = (1.0, 2.0),
    repetitions: int = 2,
    progress: Callable[[str, float], None] = lambda what, share: None,
    minutes: float = math.inf,
    **options: Any,
) -> list[Candidate]:
    """Plans on all prompts, then times the best plan of each set of drafters against plain `generate`, interleaved.

    Args:
        drafters: largest first; drafters that do not pay are left out.
        finalists: the most plans to time, each with the cost model and with the whole matrix every round.
        leniences: values to try for plans with inner reviewers.
        repetitions: the most timed passes.
        progress: called with the current task and the share of the time that has passed.
        minutes: the time limit; at least one prompt is observed and timed, even if that takes longer.
        options: of `generate`.

    Returns:
        The candidates, the fastest first.

    Raises:
        ValueError: `minutes` is not above 0.
    """
    if minutes <= 0:
        raise ValueError(f"minutes={minutes} leaves no time to tune in; give a number above 0, such as 3")
    setup = Setup(target, {"max_new_tokens": LENGTH, **options})
    allowance = Allowance(60 * minutes, progress)
    setup.options["max_new_tokens"] = affordable_length(setup, drafters, prompts, allowance)
    allowance.tell("observing the target")
    measured = observed(setup, drafters, prompts, allowance)
    allowance.tell("replaying K matrices")
    until = allowance.passed + SEARCHING * allowance.remaining
    plans = alternatives(search(measured, lambda: allowance.passed > until), finalists)
    plain = sum(trace.plain for trace in measured.traces) / len(measured.traces)
    plans = affordable(plans, leniences, plain, len(prompts), allowance)
    made = {
        f"{n}": (plan, extra, CascadeDrafter([drafters[j] for j in plan.kept], k_matrix=plan.trimmed(), **extra))
        for n, (plan, extra) in enumerate(variants(plans, leniences))
    }
    cells = [Cell(Method("plain", {}))]
    cells += [Cell(Method(name, {"assistant": cascade})) for name, (_, _, cascade) in made.items()]
    run = timed(setup, cells, prompts, repetitions, allowance)
    return ranked(made, run, setup.options["max_new_tokens"])


def affordable_length(
    setup: Setup, drafters: Sequence[Drafter], prompts: Sequence[Prompt], allowance: Allowance
) -> int:
    """The length of texts with which two prompts can be observed in half of the time.

    It writes a short text twice; the first time warms up.
    """
    wanted, few = setup.options["max_new_tokens"], min(SHORTEST, setup.options["max_new_tokens"])
    options = encode(setup, prompts[:1]) | setup.options | {"max_new_tokens": few, "min_new_tokens": few}
    target = cast(Any, setup.target)
    target.generate(**options)
    began = allowance.passed
    target.generate(**options)
    each = (allowance.passed - began) / few
    if math.isinf(allowance.seconds):
        return wanted
    passes = 3 + sum(2 * len(drafter.models()) for drafter in drafters)  # of plain `generate`, to observe one prompt
    fits = OBSERVING * allowance.seconds / (2 * passes * each)
    return max(min(wanted, int(fits)), few)


def observed(setup: Setup, drafters: Sequence[Drafter], prompts: Sequence[Prompt], allowance: Allowance) -> Measured:
    """Measures the drafters on as many prompts as half of the time allows."""

    def enough(done: int) -> bool:
        allowance.tell(f"observed {done} of {len(prompts)} prompts")
        return allowance.passed * (done + 1) / done > OBSERVING * allowance.seconds

    encoded = [encode(setup, [prompt]) for prompt in prompts]
    return measure_drafters(setup.target, drafters, encoded, enough=enough, **setup.options)


def affordable(
    plans: Sequence[Plan], leniences: Sequence[float], plain: float, prompts: int, allowance: Allowance
) -> Sequence[Plan]:
    """The first plans, as many as can be timed on a few prompts each in the remaining time; at least one.

    Args:
        plain: seconds in which plain `generate` writes a text.
        prompts: how many prompts there are.
    """
    texts = 1 + min(prompts, FEW_PROMPTS)  # one to warm up
    for count in range(len(plans), 1, -1):
        speeds = [min(max(plan.expected.speedup, 1.0), TRUSTED) for plan, _ in variants(plans[:count], leniences)]
        if plain * (1 + sum(1 / speed for speed in speeds)) * texts <= allowance.remaining:
            return plans[:count]
    return plans[:1]


def timed(
    setup: Setup, cells: Sequence[Cell], prompts: Sequence[Prompt], repetitions: int, allowance: Allowance
) -> Run:
    """Times the cells side by side on each prompt until the time is up."""
    what = f"timing {len(cells) - 1} candidates"
    run = measure(
        setup,
        cells,
        prompts,
        repetitions,
        progress=lambda task, share: allowance.tell(f"{what}, {task}"),
        over=lambda seconds: seconds > allowance.remaining,
    )
    allowance.say("timed", 1.0)
    return run


def ranked(
    made: Mapping[str, tuple[Plan, Mapping[str, Any], CascadeDrafter]], run: Run, tokens: int
) -> list[Candidate]:
    """The candidates, the fastest first, each compared with plain `generate` and with the fastest candidate."""
    measured = {name: ratio(run, name, "plain") for name in made}
    fastest = max(measured, key=lambda name: measured[name].median)
    prompts = len({sample.group for sample in run.samples})
    repetitions = len({sample.repetition for sample in run.samples})
    found = []
    for name, (plan, extra, cascade) in made.items():
        behind = Interval(1.0, 1.0, 1.0) if name == fastest else ratio(run, fastest, name)
        found.append(Candidate(plan, extra, measured[name], cascade, prompts, repetitions, tokens, behind))
    return sorted(found, key=lambda candidate: -candidate.measured.median)


def preferred(found: Sequence[Candidate]) -> Candidate:
    """The fastest candidate. Among equally fast ones, lenience 1 comes first, then the cost model."""
    bar = AS_GOOD * max(candidate.measured.median for candidate in found)
    return min(
        (candidate for candidate in found if candidate.measured.median >= bar),
        key=lambda c: (c.options["lenience"] > 1, c.options["schedule"] != SCHEDULES[0], -c.measured.median),
    )


def variants(plans: Sequence[Plan], leniences: Sequence[float]) -> list[tuple[Plan, dict[str, Any]]]:
    """Every plan with each schedule and, if one of its drafters reviews, with each lenience."""
    made = []
    for plan in plans:
        reviews = any(any(row) for row in plan.trimmed()[1:])
        for lenience in leniences if reviews else (1.0,):
            made += [(plan, {"lenience": lenience, "schedule": schedule}) for schedule in SCHEDULES]
    return made
