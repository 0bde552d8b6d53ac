"""Times ways to generate side by side, for `csdraft bench` and `csdraft tune`.

All methods take turns on the same prompts in one process, so other work on the machine slows all of them alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from csdraft.metrics.intervals import Interval, bootstrap_median

__all__ = [
    "Cell", "Method", "Prompt", "Result", "Run", "Sample", "Setup", "Text", "TokenTimes", "aligned", "configured",
    "encode", "equality", "generate", "measure", "ratio", "synchronize",
]  # fmt: skip

Prompt = tuple[int, ...]
"""Token ids."""
Text = tuple[tuple[int, ...], ...]
"""New tokens of each row."""


@dataclass(frozen=True)
class Setup:
    """What all methods of a run have in common: the target, and keywords of every `generate` (length, temperature).

    The clock gives wall time, or the process's CPU time, which other programs disturb less.
    """

    target: PreTrainedModel
    options: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Method:
    """One way to generate: its name in tables, keywords of `generate`, and what is called, untimed, before a call."""

    name: str
    options: dict[str, Any]
    before: Callable[[], None] | None = None

    @property
    def drafted(self) -> bool:
        """Whether csdraft decodes, and not transformers."""
        return "assistant" in self.options


@dataclass(frozen=True)
class Cell:
    """A method at a batch size."""

    method: Method
    rows: int = 1

    @property
    def name(self) -> str:
        return self.method.name if self.rows == 1 else f"{self.method.name}@{self.rows}"


@dataclass(frozen=True)
class Sample:
    """A timed repetition of a cell on a group of prompts.

    Attributes:
        seconds: from call to return of `generate`, summed over the group's calls.
        first: seconds to the first token, mean over the calls; None for batches, which take no streamer.
        tokens: number of generated tokens.
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


@dataclass
class Run:
    """The measurements.

    Attributes:
        texts: (cell, group) -> the different texts that it gave, each as the new tokens of each row.
    """

    samples: list[Sample] = field(default_factory=list)
    texts: dict[tuple[str, int], list[Text]] = field(default_factory=dict)

    def add(self, cell: str, group: int, repetition: int, result: Result) -> None:
        seen = self.texts.setdefault((cell, group), [])
        if result.text not in seen:
            seen.append(result.text)
        tokens = sum(map(len, result.text))
        self.samples.append(Sample(cell, group, repetition, result.seconds, result.first, tokens))


@dataclass(frozen=True)
class Result:
    """What a cell gave for a group of prompts; see `Sample` for the times."""

    seconds: float
    first: float | None
    text: Text


class TokenTimes(BaseStreamer):
    """A streamer that notes times: first that of the prompt, then that of each new token."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.marks = clock, list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(self.clock())

    def end(self) -> None:
        pass


def measure(
    setup: Setup,
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    repetitions: int,
    progress: Callable[[str, float], None] = lambda what, share: None,
    look: Callable[[Cell, Sequence[Prompt], int], None] | None = None,
    over: Callable[[float], bool] = lambda seconds: False,
) -> Run:
    """Times all cells on all prompts.

    The order of the cells is rotated from one prompt and repetition to the next, so no cell always follows the same
    one. First, every cell runs once on the first prompts without being timed.

    Args:
        repetitions: timed passes over the prompts.
        progress: called with the current task and the share of the work that is done.
        look: if given, it is called with each cell, each group of prompts and the group's number in a first pass,
            which is not timed.
        over: called before each group of prompts but the first, with the mean seconds that a group takes; True ends
            the run.
    """
    size = max(cell.rows for cell in cells)
    groups = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    run = Run()
    for cell in cells:
        generate(setup, cell, groups[0])
    looks, began = look is not None, setup.clock()
    passes = repetitions + looks
    for number in range(passes):
        for index, group in enumerate(groups):
            if (done := number * len(groups) + index) and over((setup.clock() - began) / done):
                return run
            turn = (number + index) % len(cells)
            for cell in [*cells[turn:], *cells[:turn]]:
                if look is not None and number == 0:
                    look(cell, group, index)
                else:
                    run.add(cell.name, index, number - looks, generate(setup, cell, group))
            what = f"repetition {number + 1 - looks} of {repetitions}" if number or not looks else "untimed pass"
            progress(what, (done + 1) / (passes * len(groups)))
    return run


def generate(setup: Setup, cell: Cell, group: Sequence[Prompt]) -> Result:
    """Runs `generate` on a group of prompts, in batches of the cell's size."""
    target, method, clock = cast(Any, setup.target), cell.method, setup.clock
    seconds, firsts, rows = 0.0, [], []
    for i in range(0, len(group), cell.rows):
        inputs = encode(setup, group[i : i + cell.rows])
        times = TokenTimes(clock) if cell.rows == 1 else None
        if method.before is not None:
            method.before()
        fresh = {"reuse": False} if method.drafted else {}  # reads prompts again, as plain `generate` does
        torch.manual_seed(0)
        synchronize(target.device)
        started = clock()
        output = target.generate(**inputs, **setup.options, **method.options, **fresh, streamer=times)
        synchronize(target.device)
        seconds += clock() - started
        if times is not None:
            firsts.append(times.marks[1] - started)
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


def configured(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """A copy of the model with other defaults in its `generation_config`. It shares weights and hooks."""
    twin = copy.copy(model)
    twin.generation_config = copy.deepcopy(model.generation_config)
    for key, value in options.items():
        setattr(twin.generation_config, key, value)
    return twin


def _trimmed(row: list[int], target: PreTrainedModel) -> tuple[int, ...]:
    """A row's new tokens without the padding after the end of its text."""
    ends = target.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: last + 1])


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(run: Run, cell: str, over: str) -> Interval:
    """Tokens per second of `cell` over those of `over`, paired by prompt and repetition."""
    rates = {(s.cell, s.group, s.repetition): s.rate for s in run.samples}
    table: dict[int, list[float]] = {}
    for (name, group, repetition), rate in rates.items():
        if name == cell:
            table.setdefault(group, []).append(rate / rates[over, group, repetition])
    return bootstrap_median(list(table.values()))


def equality(texts: dict[tuple[str, int], list[Text]], cell: str, reference: str) -> tuple[int, tuple[int, ...]]:
    """How many groups of prompts always gave the reference's text, and which groups did not."""
    groups = sorted(group for name, group in texts if name == cell)
    different = [g for g in groups if texts[cell, g] != texts[reference, g][:1]]
    return len(groups) - len(different), tuple(different)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is the head. The first column is aligned left, the others right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip()  # rjust takes cell and width
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
