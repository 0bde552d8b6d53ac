"""A benchmark's figures as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import csdraft
from benchmarks.figures import Figures
from benchmarks.measure import Run
from csdraft.bench import aligned

__all__ = ["machine", "plot", "save", "table"]

FORMAT = 1
HEAD = ("method", "tokens/s", "first ms", "speed-up [95 %]", "tokens/round", "outside", "peak MiB", "text")
NOTES = (
    "speed-up: over the first row, paired by prompt and repetition, median [95 % bootstrap interval]",
    "outside: share of the time outside model forwards (hooks on the models, all methods alike, in a pass of its own)",
    "text: prompts whose text equals plain generate's (under sampling: csdraft's own without a drafter)",
)


def table(figures: Sequence[Figures]) -> str:
    """The figures, one row a method, in at most 110 columns."""
    return "\n".join([aligned([HEAD, *map(_cells, figures)]), "", *NOTES])


def _cells(f: Figures) -> tuple[str, ...]:
    text = "" if f.equal is None else f"{f.equal}/{f.compared} equal" + ("" if not f.different else " DIFFERENT")
    return (
        f.name,
        f"{f.tokens_per_second:,.1f}",
        _number(f.first_token_ms, "{:.1f}"),
        str(f.speedup),
        _number(f.block_efficiency, "{:.2f}"),
        _number(f.outside_share, "{:.0%}"),
        _number(f.peak_mib, "{:.0f}"),
        text,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The class of machine, the state it was in, and versions; nothing that names it."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if os.name == "posix" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {"csdraft": csdraft.__version__}
        | {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(
    path: Path, about: dict[str, Any], figures: Sequence[Figures], run: Run | None, claims: Sequence[Any]
) -> None:
    """Everything as JSON: machine, settings, figures, claims and all samples."""
    document = {
        "csdraft_benchmark": FORMAT,
        **about,
        "figures": [f.to_dict() for f in figures],
        "claims": [claim.to_dict() for claim in claims],
        "samples": [vars(sample) for sample in run.samples] if run is not None else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path, figures: Sequence[Figures], title: str) -> None:
    """Speed-ups as bars with their intervals, in an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "csdraft"  # the same figures give the same file
    from matplotlib import pyplot

    shown = figures[::-1]
    middles = [f.speedup.median for f in shown]
    errors = [
        [max(f.speedup.median - f.speedup.low, 0) for f in shown],
        [max(f.speedup.high - f.speedup.median, 0) for f in shown],
    ]
    colours = ["#0072b2" if not f.name.startswith(("plain", "hf_")) else "#999999" for f in shown]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(shown) + 1.4))
    axes.barh([f.name for f in shown], middles, color=colours, xerr=errors, ecolor="#333333", capsize=3)
    axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle="--")
    for place, f in enumerate(shown):
        axes.annotate(f" {f.speedup.median:.2f}", (f.speedup.high, place), va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * max(f.speedup.high for f in shown))
    axes.set_xlabel("speed-up over plain generate (median, 95 % interval; grey: transformers)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
