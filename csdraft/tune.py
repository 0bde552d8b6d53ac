"""From drafters and prompts to a cascade: what is expected of the best K matrices, then what was measured.

The work has three parts, and a time for all of them: the target writes and drafters are compared with it, K matrices
are replayed, the best are timed. The first may take half of the time, the second a share of the rest; timing ends at
the last prompt for which there is time. Fewer prompts are observed, and fewer plans and prompts timed, where the time
is short; what was timed is said with each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from csdraft.bench import Cell, Method, Prompt, Setup, encode, generate
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.interfaces import Drafter
from csdraft.metrics.intervals import Interval, bootstrap_median
from csdraft.planner.allowance import Allowance
from csdraft.planner.expect import Expectation
from csdraft.planner.search import Plan, alternatives, search
from csdraft.planner.trace import Measured, measure_drafters

__all__ = ["Candidate", "preferred", "tune"]

SCHEDULES = ("cost_model", "fixed")
AS_GOOD = 0.97
"""Share of the best speed-up that a clock cannot tell from it."""
OBSERVING, SEARCHING = 0.5, 0.3
"""Shares of the time that is left, for observing and then for replaying."""
FEW_PROMPTS = 4
"""Timed prompts that are worth more than another plan."""
LENGTH = 96
"""Tokens of a text, if the options do not say."""
SHORTEST = 16
"""Tokens that a text has at least."""
TRUSTED = 2.0
"""Expected speed-up above which none is believed, where time is shared out."""
LEAST_COMPARED = 3
"""Prompts below which two candidates are never told apart."""

Times = dict[str, list[list[float]]]
"""Seconds by the name of a cell: (prompts, repetitions)."""


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
        prompts, repetitions: that were timed.
        tokens: of the longest texts.
        behind: its time over that of the fastest, paired; exactly 1 for the fastest itself.
    """

    kept: Sequence[int]
    k_matrix: list[list[int]]
    options: Mapping[str, Any]
    expected: Expectation
    measured: Interval
    cascade: CascadeDrafter
    prompts: int
    repetitions: int
    tokens: int
    behind: Interval

    @property
    def told_apart(self) -> bool:
        """Whether what was measured shows that it is slower than the fastest."""
        return self.prompts >= LEAST_COMPARED and self.behind.low > 1


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
        target: the model.
        drafters: largest first; of those that do not pay none is kept.
        prompts: token ids.
        finalists: plans to time at most, each under the cost model and under the whole matrix every round.
        leniences: of inner reviewers, to try on plans that have some.
        repetitions: timed passes at most.
        progress: called with what is going on and the share of the expected time that has passed.
        minutes: for all of it. Where that is short, texts are, too, and prompts are left out; at least one prompt is
            observed and timed, even if that takes longer.
        options: of `generate`.

    Returns:
        The candidates, the fastest measured first.
    """
    if minutes <= 0:
        raise ValueError(f"minutes={minutes} leaves no time to tune in; give a number above 0, such as 3")
    setup = Setup(target, {"max_new_tokens": LENGTH, **options})
    allowance = Allowance(60 * minutes, progress)
    setup.options["max_new_tokens"], each = affordable_length(setup, drafters, prompts, allowance)
    most = 1 + finalists * len(SCHEDULES) * len(leniences)  # cells, plain among them
    allowance.tell("observing the target", len(prompts) * (each * (passes(drafters) + repetitions * most)))
    measured = observed(setup, drafters, prompts, allowance, most * (1 + repetitions * len(prompts)))
    plain = sum(trace.plain for trace in measured.traces) / len(measured.traces)
    allowance.tell("replaying K matrices", most * plain * (1 + repetitions * len(prompts)))
    until = allowance.passed + SEARCHING * allowance.remaining
    plans = alternatives(search(measured, lambda: allowance.passed > until), finalists)
    plans = affordable(plans, leniences, plain, len(prompts), allowance)
    made = {
        f"{n}": (plan, extra, CascadeDrafter([drafters[j] for j in plan.kept], k_matrix=plan.trimmed(), **extra))
        for n, (plan, extra) in enumerate(variants(plans, leniences))
    }
    cells = [Cell(Method("plain", {}))]
    cells += [Cell(Method(name, {"assistant": cascade})) for name, (_, _, cascade) in made.items()]
    times = timed(setup, cells, prompts, repetitions, allowance)
    return ranked(made, times, setup.options["max_new_tokens"])


def passes(drafters: Sequence[Drafter]) -> int:
    """About as many times as plain `generate` observing one prompt takes: plain, at many widths, and every drafter."""
    return 3 + sum(2 * len(drafter.models()) for drafter in drafters)


def affordable_length(
    setup: Setup, drafters: Sequence[Drafter], prompts: Sequence[Prompt], allowance: Allowance
) -> tuple[int, float]:
    """Tokens of the texts, so that two prompts can be observed in half of the time; and about the seconds of a text.

    A text of a few tokens is written for it, twice: the first warms up.
    """
    wanted, few = setup.options["max_new_tokens"], min(SHORTEST, setup.options["max_new_tokens"])
    options = setup.options | {"max_new_tokens": few, "min_new_tokens": few}
    inputs, target = encode(setup, prompts[:1]), cast(Any, setup.target)
    for _ in range(2):
        began = allowance.passed
        target.generate(**inputs, **options)
    each = (allowance.passed - began) / few  # type: ignore[possibly-unbound]
    if math.isinf(allowance.seconds):
        return wanted, each * wanted
    fits = OBSERVING * allowance.seconds / (2 * passes(drafters) * each)
    length = max(min(wanted, int(fits)), few)
    return length, each * length


def observed(
    setup: Setup, drafters: Sequence[Drafter], prompts: Sequence[Prompt], allowance: Allowance, later: int
) -> Measured:
    """What planning needs to know, of as many prompts as half of the time allows.

    Args:
        later: texts that will be written when candidates are timed, for the estimate of what is left.
    """
    until = OBSERVING * allowance.seconds
    seconds: list[float] = []  # at which each prompt was done

    def enough(done: int) -> bool:
        seconds.append(allowance.passed)
        each = seconds[-1] / done
        before = min(each * (len(prompts) - done), max(until - seconds[-1], 0.0))
        allowance.tell(f"observed {done} of {len(prompts)} prompts", before + later * each / passes(drafters))
        return seconds[-1] + each > until

    encoded = [encode(setup, [prompt]) for prompt in prompts]
    return measure_drafters(setup.target, drafters, encoded, enough=enough, **setup.options)


def affordable(
    plans: Sequence[Plan], leniences: Sequence[float], plain: float, prompts: int, allowance: Allowance
) -> Sequence[Plan]:
    """The first plans, so many that each can be timed on a few prompts in the time that is left; at least one.

    Args:
        plain: seconds of a text of plain `generate`.
        prompts: that there are.
    """
    texts = 1 + min(prompts, FEW_PROMPTS)  # the first one warms up
    for count in range(len(plans), 1, -1):
        speeds = [min(max(plan.expected.speedup, 1.0), TRUSTED) for plan, _ in variants(plans[:count], leniences)]
        if plain * (1 + sum(1 / speed for speed in speeds)) * texts <= allowance.remaining:
            return plans[:count]
    return plans[:1]


def timed(
    setup: Setup, cells: Sequence[Cell], prompts: Sequence[Prompt], repetitions: int, allowance: Allowance
) -> Times:
    """Seconds of every cell, prompt by prompt, in whole repetitions; of a part of the prompts if there is no time.

    The order of the cells is rotated, so that none always follows the same one.
    """
    for cell in cells:
        generate(setup, cell, prompts[:1])  # warms up
    times: Times = {cell.name: [[] for _ in prompts] for cell in cells}
    steps = [(repetition, place) for repetition in range(repetitions) for place in range(len(prompts))]
    began = allowance.passed
    for number, (repetition, place) in enumerate(steps):
        each = (allowance.passed - began) / number if number else 0.0
        if number and each > allowance.remaining:
            break
        turn = (repetition + place) % len(cells)
        for cell in [*cells[turn:], *cells[:turn]]:
            times[cell.name][place].append(generate(setup, cell, [prompts[place]]).seconds)
        left = (allowance.passed - began) / (number + 1) * (len(steps) - number - 1)
        allowance.tell(f"timing {len(cells) - 1} candidates, repetition {repetition + 1} of {repetitions}", left)
    allowance.say("timed", 1.0)
    whole = max(min(map(len, times[cells[0].name])), 1)
    return {name: [row[:whole] for row in table if len(row) >= whole] for name, table in times.items()}


def ranked(
    made: Mapping[str, tuple[Plan, Mapping[str, Any], CascadeDrafter]], times: Times, tokens: int
) -> list[Candidate]:
    """The candidates, the fastest first, each compared with plain `generate` and with the fastest by prompt."""
    measured = {name: _paired(times["plain"], times[name]) for name in made}
    fastest = max(measured, key=lambda name: measured[name].median)
    found = []
    for name, (plan, extra, cascade) in made.items():
        prompts, repetitions = len(times[name]), len(times[name][0])
        behind = Interval(1.0, 1.0, 1.0) if name == fastest else _paired(times[name], times[fastest])
        own = (plan.kept, plan.trimmed(), extra, plan.expected, measured[name], cascade)
        found.append(Candidate(*own, prompts, repetitions, tokens, behind))
    return sorted(found, key=lambda candidate: -candidate.measured.median)


def _paired(times: list[list[float]], others: list[list[float]]) -> Interval:
    """`times` over `others`, prompt by prompt and repetition by repetition."""
    return bootstrap_median([[a / b for a, b in zip(*rows, strict=True)] for rows in zip(times, others, strict=True)])


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
