"""Prepares a target and its drafters before the first text: records and times forwards of fixed shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.amounts import size_text
from csdraft.cascade import as_drafter, options_of
from csdraft.checks.refusals import refusal
from csdraft.decoding.feature_session import OWN, FeatureModel
from csdraft.decoding.graphs import FEWEST_SLOTS, Mode, bucket
from csdraft.decoding.inputs import Inputs, Plan, Shape
from csdraft.decoding.loop import BUCKET
from csdraft.decoding.names import distinct, name_of
from csdraft.decoding.reader import WIDEST, Reader
from csdraft.decoding.readers import borrow, take_back
from csdraft.options import Options
from csdraft.progress import Progress

__all__ = ["Prepared", "Ready", "measured", "prepare"]

TIMES = 3
"""How often a forward is timed after its first run; the fastest time counts."""


@dataclass(frozen=True)
class Ready:
    """A prepared model.

    Attributes:
        costs: seconds of a forward, by shape.
        recorded: number of these shapes that are replayed from a recording.
        why_not: why forwards are not recorded; None if they are.
        bytes: size of its cache.
    """

    name: str
    costs: dict[Shape, float]
    recorded: int
    why_not: str | None
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did with the target, then with the drafters' models, and how long it took."""

    models: list[Ready] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def why_not_captured(self) -> dict[str, str]:
        """Model name -> why its forwards run eagerly; empty if all are recorded."""
        return {model.name: model.why_not for model in self.models if model.why_not is not None}

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            how = f"{model.recorded} recorded" if model.why_not is None else f"run eagerly: {model.why_not}"
            lines.append(f"{model.name}: {len(model.costs)} shapes, {how}; cache {size_text(model.bytes)}")
            widths = sorted({shape.queries for shape in model.costs})
            lines.append("  slots " + "".join(f"{f'{width} tokens':>12}" for width in widths))
            for slots in sorted({shape.slots for shape in model.costs}):
                row = {shape.queries: cost for shape, cost in model.costs.items() if shape.slots == slots}
                lines.append(f"{slots:7,} " + "".join(f"{1e3 * row[width]:9.2f} ms" for width in widths))
        return "\n".join([*lines, f"prepared in {self.seconds:.1f} s"])


def prepare(
    target: nn.Module,
    assistant: Any = None,
    rows: int = 1,
    slots: int = 2048,
    compile: bool = False,
    progress: Callable[[str, float], None] | None = None,
    options: Options | None = None,
) -> Prepared:
    """Records (or compiles) and times forwards of a target and of its drafters' models, for later calls.

    Without it, `generate` records a shape at its third use. Recordings are kept until `csdraft.release`, or as long as
    the model lives. On a CPU nothing can be recorded: forwards are only timed, and compiled if `compile` is True.

    Args:
        target: the model that will call `generate`.
        assistant: the drafter, as `generate` takes it.
        rows: batch size of the calls.
        slots: tokens of the longest text, with its answer.
        compile: compile each shape first, which takes half a minute each. Calls must then have `graphs="compile"`.
        progress: called with the current task and the share that is done; None writes a line to stderr.
        options: of the later calls; only `graphs` matters here, which says how forwards run.

    Raises:
        ValueError: for a model that csdraft cannot decode exactly, a size below 1, or compile=True with other graphs.
    """
    if rows < 1 or slots < 1:
        raise ValueError(f"rows={rows} and slots={slots} must be at least 1")
    progress = progress or Progress()
    models, drafter = [target], None if assistant is None else as_drafter(assistant, target)
    if drafter is not None:
        models += [model for model in drafter.models() if model is not target]
    graphs = _graphs(compile, options_of(drafter, Options.of(options)))
    started, ready = time.perf_counter(), []
    named = list(zip(distinct(map(name_of, models)), models, strict=True))
    for name, model in named:
        if reason := refusal(model):
            raise ValueError(f"{name} {reason}")
    for name, model in reversed(named):  # the target last: if memory is short, the oldest recordings are dropped
        shapes = [(width, seen) for seen in _doublings(FEWEST_SLOTS, bucket(slots)) for width in _doublings(1, WIDEST)]
        taps = drafter.taps() if drafter is not None and model is target else frozenset[int]()
        ready.append(measured(name, model, rows, shapes, graphs, progress, taps))
    return Prepared(ready[::-1], time.perf_counter() - started)


def _graphs(compile: bool, options: Options) -> Mode:
    """How the forwards of later calls run; raises ValueError if both arguments say so and disagree."""
    if compile and options.graphs not in (None, "compile"):
        raise ValueError(f"compile=True and options.graphs={options.graphs!r} are two ways to run; give one of them")
    if compile:
        return "compile"
    return "auto" if options.graphs is None else options.graphs


@torch.no_grad()
def measured(
    name: str,
    model: nn.Module,
    rows: int,
    shapes: Sequence[tuple[int, int]],
    mode: Mode,
    progress: Callable[[str, float], None],
    taps: frozenset[int] = frozenset(),
) -> Ready:
    """Times forwards of one model, and records or compiles them.

    Args:
        shapes: (tokens that a forward reads, slots of the cache that it sees).
        mode: how forwards run, see `csdraft.decoding.graphs`.
        taps: hidden states of the model that drafters will read.
    """
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return Ready(name, {}, 0, "an encoder-decoder reads a different source in each call", 0)
    slots = max(seen for _, seen in shapes)
    if isinstance(model, FeatureModel) and model.feature_width != model.config.hidden_size:  # type: ignore[attr-defined]
        return Ready(name, {}, 0, "only a call knows what a forward of this head is for", 0)
    if isinstance(model, FeatureModel):
        taps, mode = frozenset({OWN}), mode and "auto"
    reader, _ = borrow(model, rows, slots, [()] * rows, taps)
    if isinstance(model, FeatureModel):
        reader.features = partial(_no_features, model, reader)
    reader.begin(None, False, mode)
    reader.reserve(slots + 2 * BUCKET)  # as many as a call will reserve, so that the cache need not move
    last = reader.last_position
    reader.read([_plan(2, 4, last)] * rows, 1)  # makes the cache's buffers
    costs = {}
    longest_first = sorted(shapes, key=lambda shape: -shape[1])  # if there are too many, the first are dropped
    for done, (width, seen) in enumerate(longest_first):
        progress(f"{name}: {width} tokens, {seen} slots", done / len(shapes))
        seen = min(seen, reader.cache.capacity)
        costs[Shape(rows, width, seen, 1)] = _seconds(reader, [_plan(width, seen, last)] * rows)
    progress(f"{name}: {len(shapes)} shapes", 1.0)
    graphs = reader.graphs
    eager = "graphs=False asks for it" if mode is False else f"no graphs on {reader.device.type}"
    why_not = eager if graphs is None else graphs.why_not
    recorded = 0 if graphs is None else len(graphs.shapes)
    reader.costs |= costs
    reader.features = None
    take_back(reader, [[]] * rows)
    return Ready(name, costs, recorded, why_not, reader.cache.bytes)


def _no_features(model: FeatureModel, reader: Reader, inputs: Inputs) -> Tensor:
    """(rows, queries, width) zeros, which a head reads in place of hidden states."""
    return torch.zeros(*inputs.ids.shape, model.feature_width, dtype=reader.dtype, device=reader.device)


def _plan(width: int, seen: int, last: int) -> Plan:
    """Reads the last `width` tokens of a text that fills `seen` slots; every token is 0, no position above `last`."""
    slots = range(seen - width, seen)
    return Plan(
        [0] * width, [min(slot, last) for slot in slots], slots, [slot + 1 for slot in slots], None, seen, seen
    )


def _doublings(first: int, last: int) -> list[int]:
    """`first` and its doublings up to `last`."""
    return [first << i for i in range((last // first).bit_length() or 1)]


def _seconds(reader: Reader, plans: list[Plan]) -> float:
    """The shortest time of a forward, without its first run."""
    times = []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        float(reader.read(plans, 1, at_once=True)[0, 0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:])
