"""Suites: fixed sets of methods and settings, each with the claims that its run must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.claims import Claim
from benchmarks.figures import Figures, equal_to, figures
from benchmarks.grid import grid_search
from benchmarks.measure import Run, measure
from benchmarks.methods import DEFAULT, Setup, build
from benchmarks.overhead import measure_overhead, overhead_claims, overhead_table
from benchmarks.planning import check_planner
from csdraft.bench import Cell, Prompt, ratio
from csdraft.metrics.intervals import Interval

__all__ = ["SUITES", "Outcome", "Work", "methods_suite"]

SINGLES = ("drafter", "drafter_fixed", "max_gram", "max_gram_fixed")


@dataclass(frozen=True)
class Work:
    """What a suite gets to work with; `setup` is None for suites that bring their own models."""

    setup: Setup | None
    prompts: Sequence[Prompt]
    tune_prompts: Sequence[Prompt]
    methods: Sequence[str]
    repetitions: int
    rows: int
    greedy: bool
    progress: Callable[..., None]

    def measured(self, cells: Sequence[Cell], look: bool = True) -> Run:
        assert self.setup is not None
        return measure(self.setup, cells, self.prompts, self.repetitions, self.progress, look)


@dataclass
class Outcome:
    """What a suite found."""

    figures: list[Figures] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    run: Run | None = None
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def methods_suite(work: Work) -> Outcome:
    """The methods that were asked for, and no claim but equality."""
    assert work.setup is not None
    cells = [Cell(method, work.rows) for method in build(work.methods or DEFAULT, work.setup)]
    run = work.measured(cells)
    names = [cell.method.name for cell in cells]
    found = [
        figures(run, cell.name, cells[0].name, equal_to(cell.method, work.greedy, names, cell.rows)) for cell in cells
    ]
    return Outcome(found, [equality_claim(found)], run)


def equality_claim(found: Sequence[Figures]) -> Claim:
    """Whether every method reproduced the text it owes on every prompt."""
    owing = [f for f in found if f.equal is not None]
    equal, compared = sum(f.equal or 0 for f in owing), sum(f.compared or 0 for f in owing)
    where = "; ".join(f"{f.name} on prompt {', '.join(map(str, f.different))}" for f in owing if f.different)
    figure = f"{equal}/{compared} equal" + (f" (different: {where})" if where else "")
    return Claim("every text equals the reference's, prompt by prompt, method by method", figure, equal, compared)


def claimed(outcome: Outcome, words: str, cell: str, over: str, least: float, surely: bool = False) -> None:
    """Adds a claim about a ratio of speeds, if both were measured."""
    names = {f.name for f in outcome.figures}
    if outcome.run is not None and {cell, over} <= names:
        outcome.claims.append(Claim.ratio(words, ratio(outcome.run, cell, over), least, surely))


def against_transformers(work: Work, fixed_bar: float) -> Outcome:
    outcome = methods_suite(work)
    fixed = f"same drafter and fixed length against transformers' assisted decoding, at least {fixed_bar} x"
    claimed(outcome, fixed, "drafter_fixed", "hf_assisted_fixed", fixed_bar)
    default = "default schedule against transformers' default, at least 1.25 x"
    claimed(outcome, default, "drafter", "hf_assisted_default", 1.25)
    lookup = "prompt lookup against transformers' prompt lookup, same length, at least 1 x"
    claimed(outcome, lookup, "prompt_lookup_fixed", "hf_prompt_lookup", 1.0)
    best = best_of(outcome, SINGLES)
    if best is not None:
        words = f"cascade with the cost model against the best single drafter ({best}), never below 0.97 x"
        claimed(outcome, words, "cascade", best, 0.97)
    return outcome


def best_of(outcome: Outcome, names: Sequence[str]) -> str | None:
    """The fastest of these, by paired speed-up."""
    found = [f for f in outcome.figures if f.name in names]
    return max(found, key=lambda f: f.speedup.median).name if found else None


def short(work: Work) -> Outcome:
    """Short prompts, 128 new tokens, against transformers."""
    return against_transformers(work, 1.08)


def long(work: Work) -> Outcome:
    """2,048 tokens of context, 128 new tokens, against transformers."""
    return against_transformers(work, 1.15)


def random(work: Work) -> Outcome:
    """A drafter of random weights, 256 new tokens: what a useless drafter costs."""
    outcome = methods_suite(replace(work, methods=("csdraft_empty", "random_drafter_first", "random_drafter")))
    words = "a drafter that is never accepted, {}, at least {} x of plain generate"
    claimed(outcome, words.format("first call", 0.95), "random_drafter_first", "plain", 0.95)
    claimed(outcome, words.format("later calls", 0.98), "random_drafter", "plain", 0.98)
    return outcome


def batch(work: Work) -> Outcome:
    """Batches of 8 against single prompts: how much of plain generate's gain csdraft keeps."""
    assert work.setup is not None
    rows = max(work.rows, 8)
    names = [name for name in work.methods if not name.startswith("hf_")] or ["drafter", "max_gram", "cascade"]
    methods = build(names, work.setup)
    cells = [Cell(method, size) for method in methods for size in (1, rows)]
    run = work.measured(cells)
    known = [method.name for method in methods]
    found = [figures(run, c.name, "plain", equal_to(c.method, work.greedy, known, c.rows)) for c in cells]
    outcome = Outcome(found, [equality_claim(found)], run)
    plain = ratio(run, f"plain@{rows}", "plain")
    outcome.notes.append(f"plain gains {plain} x from batches of {rows}")
    for method in methods[1:]:
        gain = ratio(run, f"{method.name}@{rows}", method.name)
        share = Interval(*(value / plain.median for value in gain))
        words = f"{method.name}: gain from batches of {rows} ({gain.median:.2f} x), at least 0.8 of plain's"
        outcome.claims.append(Claim.ratio(words, share, 0.8))
    return outcome


def overhead(work: Work) -> Outcome:
    """Time of a round outside forwards with models that cost next to nothing: vocabulary 32k, chains of 8."""
    work.progress("rounds outside forwards", 0.0)
    cases = measure_overhead()
    extra = {"overhead": [vars(case) for case in cases]}
    return Outcome(claims=overhead_claims(cases), notes=[overhead_table(cases)], extra=extra)


def grid(work: Work) -> Outcome:
    """Searches the cascade's K matrix on the tune prompts; on the others compares it with the best single drafter."""
    assert work.setup is not None
    choice = grid_search(work.setup, work.tune_prompts, work.repetitions, work.progress)
    cells = [Cell(method) for method in choice.finalists]
    run = work.measured(cells)
    found = [figures(run, cell.name, "plain", equal_to(cell.method, work.greedy, [])) for cell in cells]
    outcome = Outcome(found, [equality_claim(found)], run, [choice.table])
    best = best_of(outcome, choice.singles)
    assert best is not None
    words = f"{choice.cascade} against the best single drafter ({best}), 95 % interval above 1"
    claimed(outcome, words, choice.cascade, best, 1.0, surely=True)
    drafter = best_of(outcome, [name for name in choice.singles if name.startswith("drafter")])
    assert drafter is not None
    claimed(
        outcome,
        f"{choice.cascade} against the neural drafter alone ({drafter}), aim 1.27 x",
        choice.cascade,
        drafter,
        1.27,
    )
    outcome.extra = {"grid": choice.rates, "k_matrix": choice.k_matrix}
    return outcome


def planner(work: Work) -> Outcome:
    """What the planner expects against what is measured, and its pick against a grid's; on the tune prompts."""
    assert work.setup is not None
    claims, table, figures = check_planner(work.setup, work.tune_prompts, work.repetitions, work.progress)
    return Outcome(claims=claims, notes=[table], extra=figures)


SUITES: dict[str, Callable[[Work], Outcome]] = {
    function.__name__: function for function in (short, long, random, batch, overhead, grid, planner)
}
