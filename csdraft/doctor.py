"""What `csdraft doctor` reports: the machine, the versions, and what csdraft can do with each model."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import nn

from csdraft.amounts import count_text, size_text
from csdraft.checks.probe import difference, padding_difference
from csdraft.checks.refusals import refusal
from csdraft.decoding.graphs import FEWEST_SLOTS
from csdraft.heads.on_target import OnTarget
from csdraft.prepare import Ready, measured

__all__ = ["ModelState", "Package", "examine", "fast_dtype", "machine", "packages"]

WIDTHS = (1, 4, 8, 16)
"""Tokens of the forwards that are timed."""
UNITS = ("amx_bf16", "avx512_bf16", "amx_int8", "avx512f", "avx2", "bf16", "i8mm", "asimd")
"""Flags in /proc/cpuinfo of units for fast arithmetic."""
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
LEAST_PASSES, MOST_PASSES, ENOUGH = 3, 10, 4.0
"""The fewest and the most passes over all widths, and the seconds after which no new pass starts."""
STEADY = 1.5
"""If the median pass takes more than this many times as long as the fastest, the machine is busy."""
CHEAP, EXPENSIVE = 1.5, 3.0
"""Time of a forward of 8 tokens over that of 1 token: cheap up to CHEAP, expensive above EXPENSIVE."""


@dataclass(frozen=True)
class Package:
    """A package that csdraft needs, or Python.

    Attributes:
        version: the installed one; None if the package is missing.
        bounds: the versions that csdraft supports, such as "<5.25,>=5.23"; empty for any.
        fits: whether the version is within the bounds.
    """

    name: str
    version: str | None
    bounds: str
    fits: bool

    def __str__(self) -> str:
        found = self.version or "not installed"
        if not self.bounds:
            return f"{self.name:<16} {found}"
        return f"{self.name:<16} {found:<14} {'within' if self.fits else 'NOT WITHIN'} {self.bounds}"


@dataclass(frozen=True)
class ModelState:
    """What csdraft can do with one model.

    Attributes:
        name: as the user gave it.
        described: class, size, dtype and device.
        refused: why drafts are not possible; None if they are.
        padded_refused: why batches of texts of different lengths are not possible; None if they are.
        why_not_captured: why forwards run eagerly; None if they are recorded and replayed.
        milliseconds: of a forward, by its number of tokens; the fastest of several. Empty if not timed.
        busy: whether the times varied too much to be compared.
    """

    name: str
    described: str
    refused: str | None = None
    padded_refused: str | None = None
    why_not_captured: str | None = None
    milliseconds: dict[int, float] = field(default_factory=dict)
    busy: bool = False

    @property
    def expected(self) -> str:
        """Whether wide drafts pay, in a sentence."""
        if not self.milliseconds:
            return "not timed"
        if self.busy:
            return "unknown: other work kept the machine busy and the times vary; run it again on an idle machine"
        costs = {width: time / self.milliseconds[1] for width, time in self.milliseconds.items()}
        if 8 not in costs:
            return "unknown: the model has fewer than 8 positions"
        price = f"reading 8 tokens costs {costs[8]:.1f} times one token"
        price += f", 16 tokens {costs[16]:.1f} times" if 16 in costs else ""
        if costs[8] <= CHEAP:
            advice = "wide drafts pay: long drafts and trees cost little, even if few of their tokens are kept"
        elif costs[8] <= EXPENSIVE:
            advice = "drafts of 4 to 8 tokens pay if about half of them are kept; trees need a good drafter"
        else:
            advice = "wide drafts do not pay: keep drafts short, or try another --dtype or more --threads"
        return f"{price}; {advice}"

    def __str__(self) -> str:
        head = f"{self.name}: {self.described}"
        if self.refused is not None:
            return f"{head}\n  exact with drafts   NO: {self.refused}"
        lines = {
            "exact with drafts": "yes",
            "padded batches": "yes" if self.padded_refused is None else f"NO: {self.padded_refused}",
            "forwards captured": "yes" if self.why_not_captured is None else f"no: {self.why_not_captured}",
            "a forward of": ", ".join(f"{width}: {time:.2f} ms" for width, time in self.milliseconds.items()),
            "what to expect": self.expected,
        }
        return "\n".join([head, *(f"  {topic:<18}  {text}" for topic, text in lines.items() if text)])


def packages() -> list[Package]:
    """Python, csdraft and the packages that it requires, with the bounds from csdraft's metadata."""
    from csdraft import __version__

    try:
        wanted = [Requirement(line) for line in requires("csdraft") or ()]
        python = metadata("csdraft").get("Requires-Python") or ""
    except PackageNotFoundError:  # csdraft is on the path, but not installed
        wanted, python = [Requirement(name) for name in ("torch", "transformers")], ""
    found = [Package("csdraft", __version__, "", True), _package("python", python)]
    return found + [_package(one.name, str(one.specifier)) for one in wanted if one.marker is None]


def _package(name: str, bounds: str) -> Package:
    try:
        found = platform.python_version() if name == "python" else version(name)
    except PackageNotFoundError:
        return Package(name, None, bounds, False)
    return Package(name, found, bounds, SpecifierSet(bounds).contains(found, prereleases=True))


def machine() -> dict[str, Any]:
    """This machine, by topic: where forwards run, and which dtype is fast on its CPU."""
    text = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE) or ["", ""])[1].split())
    units = [unit for unit in UNITS if unit in flags]
    return {
        "system": platform.platform(),
        "cpu": (named[1] if named else platform.processor() or platform.machine()).strip(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "units": units,
        "bfloat16": fast_dtype(units),
        "accelerators": _accelerators(),
    }


def fast_dtype(units: Sequence[str]) -> str:
    """Which dtype to use on a CPU with these units for fast arithmetic."""
    if not units:
        return "unknown whether the CPU has units for bfloat16: time both dtypes"
    if found := [unit for unit in BFLOAT16_UNITS if unit in units]:
        return f"the CPU has units for it ({', '.join(found)}): --dtype bfloat16 is usually faster"
    return "the CPU has no units for it: --dtype float32 is usually faster"


def _accelerators() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        half = "with" if torch.cuda.is_bf16_supported() else "without"
        found.append(f"cuda:{i} {seen.name}, {size_text(seen.total_memory)}, {half} bfloat16")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def examine(name: str, model: nn.Module, progress: Callable[[str, float], None]) -> ModelState:
    """What csdraft can do with a model on its device and in its dtype. Runs short forwards and times four shapes."""
    model = model.eval()
    if isinstance(model, OnTarget):
        incomplete = f"it {model.use} and cannot run alone; name that target here, and this folder as its drafter"
        return ModelState(name, f"{model.what} of a target", refused=incomplete)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    described = f"{type(model).__name__}, {count_text(parameters)} parameters, {dtype} on {first.device}"
    if reason := refusal(model) or difference(model):
        return ModelState(name, described, refused=reason)
    config: Any = model.config
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or FEWEST_SLOTS
    slots = min(FEWEST_SLOTS, longest)
    shapes = [(width, slots) for width in WIDTHS if width <= slots]
    ready, times = _timed(name, model, shapes, progress)
    best = {width: min(found) for width, found in times.items()}
    busy = any(median(found) > STEADY * best[width] for width, found in times.items())
    return ModelState(name, described, None, padding_difference(model), ready.why_not, best, busy)


def _timed(
    name: str, model: nn.Module, shapes: Sequence[tuple[int, int]], progress: Callable[[str, float], None]
) -> tuple[Ready, dict[int, list[float]]]:
    """The result of the last pass, and by width the milliseconds in each pass.

    Each pass times all widths, so that other work on the machine disturbs all of them alike.
    """
    times: dict[int, list[float]] = {}
    started = time.monotonic()
    for done in range(MOST_PASSES):
        ready = measured(name, model, 1, shapes, "auto", lambda *_: None)
        for shape, seconds in ready.costs.items():
            times.setdefault(shape.queries, []).append(1e3 * seconds)
        share = max((done + 1) / MOST_PASSES, (time.monotonic() - started) / ENOUGH)
        if not times or (done + 1 >= LEAST_PASSES and share >= 1):
            break
        progress(f"timing {name}", min(share, 0.99))
    progress(f"timing {name}", 1.0)
    return ready, times  # type: ignore[possibly-unbound]
