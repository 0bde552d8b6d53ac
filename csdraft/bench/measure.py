"""Runs all methods on all prompts, interleaved: one instrumented pass, then the timed repetitions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from csdraft.bench.memory import PeakMemory
from csdraft.bench.methods import Method, Setup
from csdraft.decoding.report import Report

__all__ = ["Cell", "Forwards", "Look", "Prompt", "Run", "Sample", "Text", "measure"]

Prompt = tuple[int, ...]
"""Token ids."""
Text = tuple[tuple[int, ...], ...]
"""New tokens of each row."""


@dataclass(frozen=True)
class Cell:
    """One thing to be timed: a method at a batch size."""

    method: Method
    rows: int = 1

    @property
    def name(self) -> str:
        return self.method.name if self.rows == 1 else f"{self.method.name}@{self.rows}"


@dataclass(frozen=True)
class Sample:
    """One timed repetition of one cell on one group of prompts.

    Attributes:
        seconds: of `generate`, from call to return, summed over the group's calls.
        first: seconds to the first token, mean over the calls; None for batches, which have no streamer.
        tokens: generated.
    """

    cell: str
    group: int
    repetition: int
    seconds: float
    first: float | None
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


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
class Run:
    """All that was measured.

    Attributes:
        texts: (cell, group) -> every different text seen, as new tokens of each row.
    """

    samples: list[Sample] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    texts: dict[tuple[str, int], list[Text]] = field(default_factory=dict)

    def add_text(self, cell: str, group: int, text: Text) -> None:
        seen = self.texts.setdefault((cell, group), [])
        if text not in seen:
            seen.append(text)


class Stopwatch(BaseStreamer):
    """Notes when the first new token arrives."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.first, self._prompt_seen = clock, 0.0, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and not self.first:
            self.first = self.clock()
        self._prompt_seen = True

    def end(self) -> None:
        pass


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
                _synchronize(model.device)
                started[0] = self.clock()

            def after(model: Any, inputs: Any, out: Any, index: int = index, started: list[float] = started) -> None:
                _synchronize(model.device)
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
    """Times all cells on all prompts.

    The order of the cells is rotated from one prompt and repetition to the next, so that none always follows the
    same one. Before anything is timed, every cell has run once on each prompt with the instruments on (or once on
    the first, without them).

    Args:
        repetitions: timed passes over the prompts.
        progress: called with what is being done and the share of the work that is done.
        look: whether to run the instrumented pass.
    """
    size = max(cell.rows for cell in cells)
    groups = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    run = Run()
    for cell in cells:
        generate(setup, cell, groups[0])
    passes = repetitions + look
    for number in range(passes):
        for index, group in enumerate(groups):
            turn = (number + index) % len(cells)
            for cell in [*cells[turn:], *cells[:turn]]:
                if look and number == 0:
                    _look(setup, cell, group, index, run)
                else:
                    result = generate(setup, cell, group)
                    run.add_text(cell.name, index, result.text)
                    run.samples.append(result.sample(cell, index, number - look))
            what = "instrumented pass" if look and number == 0 else f"repetition {number + 1 - look} of {repetitions}"
            progress(what, (number * len(groups) + index + 1) / (passes * len(groups)))
    return run


@dataclass
class Result:
    seconds: float
    first: float | None
    text: Text

    @property
    def tokens(self) -> int:
        return sum(map(len, self.text))

    def sample(self, cell: Cell, group: int, repetition: int) -> Sample:
        return Sample(cell.name, group, repetition, self.seconds, self.first, self.tokens)


def generate(setup: Setup, cell: Cell, group: Sequence[Prompt]) -> Result:
    """Runs `generate` as often as the group needs at the cell's batch size."""
    target, method, clock = cast(Any, setup.target), cell.method, setup.clock
    seconds, firsts, rows = 0.0, [], []
    for i in range(0, len(group), cell.rows):
        inputs = encode(setup, group[i : i + cell.rows])
        stopwatch = Stopwatch(clock) if cell.rows == 1 else None
        if method.before is not None:
            method.before()
        fresh = {"reuse": False} if method.drafted else {}  # prompts are read again, as in plain `generate`
        torch.manual_seed(0)
        _synchronize(target.device)
        started = clock()
        output = target.generate(**inputs, **setup.options, **method.options, **fresh, streamer=stopwatch)
        _synchronize(target.device)
        seconds += clock() - started
        if stopwatch is not None:
            firsts.append(stopwatch.first - started)
        start = 1 if target.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        rows += [_trimmed(row, target) for row in output[:, start:].tolist()]
    return Result(seconds, sum(firsts) / len(firsts) if firsts else None, tuple(rows))


def encode(setup: Setup, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """A batch, padded on the left, on the target's device."""
    longest, pad = max(map(len, prompts)), setup.target.generation_config.pad_token_id
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = setup.target.device
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _trimmed(row: list[int], target: PreTrainedModel) -> tuple[int, ...]:
    """A row's new tokens without the padding after the end of its text."""
    ends = target.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: last + 1])


def _look(setup: Setup, cell: Cell, group: Sequence[Prompt], index: int, run: Run) -> None:
    """One instrumented repetition, a call at a time."""
    models = setup.models
    for i in range(0, len(group), cell.rows):
        with (
            Forwards(models, setup.clock) as forwards,
            PeakMemory(setup.target.device) as memory,
            _reports(cell.method) as reports,
        ):
            result = generate(setup, cell, group[i : i + cell.rows])
        report = reports[-1] if reports else None
        counts = forwards.counts[0], result.tokens, len(result.text)
        run.looks.append(Look(cell.name, index, result.seconds, sum(forwards.seconds), *counts, memory.peak, report))


@contextlib.contextmanager
def _reports(method: Method) -> Iterator[list[Report]]:
    """The reports of csdraft's calls: a drafter that has `keep_report` is handed each one."""
    reports: list[Report] = []
    drafter = method.options.get("assistant")
    if drafter is not None:
        object.__setattr__(drafter, "keep_report", reports.append)  # drafters are frozen
    try:
        yield reports
    finally:
        if drafter is not None:
            object.__delattr__(drafter, "keep_report")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
