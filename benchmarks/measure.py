"""Runs all methods on all prompts, interleaved: one instrumented pass, then the timed repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

import csdraft
from benchmarks.memory import PeakMemory
from benchmarks.methods import Setup
from csdraft import bench
from csdraft.bench import Cell, Prompt, generate, synchronize
from csdraft.reports.report import Report

__all__ = ["Forwards", "Look", "Run", "measure"]


@dataclass(frozen=True)
class Look:
    """What the instrumented pass saw of one cell on one group: not timed, so that instruments may cost something.

    Attributes:
        forward_seconds: in the forwards of all models, by hooks on the models themselves.
        target_forwards: forwards of the target.
        peak: bytes above the level before the call.
        report: csdraft's own; None for transformers' methods.
    """

    cell: str
    group: int
    seconds: float
    forward_seconds: float
    target_forwards: int
    tokens: int
    rows: int
    peak: int | None
    report: Report | None

    @property
    def outside_share(self) -> float:
        """Share of the time spent outside the models' forwards."""
        return 1 - self.forward_seconds / self.seconds

    @property
    def block_efficiency(self) -> float:
        """Tokens a round; transformers' batches are plain, one token a round."""
        if self.report is not None:
            return self.report.block_efficiency
        return self.tokens / self.target_forwards if self.rows == 1 else 1.0


@dataclass
class Run(bench.Run):
    """All that was measured, timed or not."""

    looks: list[Look] = field(default_factory=list)


class Forwards:
    """Counts and times the forwards of some models by hooks, while it is entered."""

    def __init__(self, models: Sequence[PreTrainedModel], clock: Callable[[], float] = time.perf_counter):
        self.models, self.clock = models, clock
        self.counts = [0] * len(models)
        self.seconds = [0.0] * len(models)

    def __enter__(self) -> Forwards:
        self._handles = []
        for index, model in enumerate(self.models):
            started = [0.0]

            def before(model: Any, inputs: Any, started: list[float] = started) -> None:
                synchronize(model.device)
                started[0] = self.clock()

            def after(model: Any, inputs: Any, out: Any, index: int = index, started: list[float] = started) -> None:
                synchronize(model.device)
                self.seconds[index] += self.clock() - started[0]
                self.counts[index] += 1

            self._handles += [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def measure(
    setup: Setup,
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    repetitions: int,
    progress: Callable[[str, float], None] = lambda what, share: None,
    look: bool = True,
) -> Run:
    """`csdraft.bench.measure` after a pass with the instruments on, unless `look` is False."""
    looks: list[Look] = []

    def instrumented(cell: Cell, group: Sequence[Prompt], index: int) -> None:
        looks.extend(_look(setup, cell, group, index))

    timed = bench.measure(setup, cells, prompts, repetitions, progress, instrumented if look else None)
    return Run(timed.samples, timed.texts, looks)


def _look(setup: Setup, cell: Cell, group: Sequence[Prompt], index: int) -> Iterator[Look]:
    """One instrumented repetition, a call at a time."""
    models = setup.models
    for i in range(0, len(group), cell.rows):
        with (
            Forwards(models, setup.clock) as forwards,
            PeakMemory(setup.target.device) as memory,
        ):
            result = generate(setup, cell, group[i : i + cell.rows])
        report = csdraft.report(cell.method.options.get("assistant"), last=True)
        counts = forwards.counts[0], sum(map(len, result.text)), len(result.text)
        yield Look(cell.name, index, result.seconds, sum(forwards.seconds), *counts, memory.peak, report)
