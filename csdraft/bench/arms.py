"""Which loss and which texts: drafters distilled from one start for equal steps, compared prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from csdraft.bench.statistics import bootstrap_mean
from csdraft.trainers.arguments import make_arguments
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.exam import Exam
from csdraft.trainers.run import distill, make_exam, read_target

__all__ = ["compare_arms"]

Figures = dict[str, Any]
"""Of an arm: `greedy` and `sampled` block efficiency of each prompt, `acceptance` and `agreement` over all."""


def compare_arms(common: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """Trains and examines every arm that is not yet done.

    Args:
        common: of `DistillArguments`; every arm trains in `output_dir/<arm>`, where a killed run goes on, and the
            figures go to `output_dir/arms.json`.
        arms: by name, the keys that an arm changes; none of them is the start, untrained.
        baseline: arm that the others are compared with, prompt by prompt.

    Returns:
        A table.
    """
    folder = Path(common["output_dir"])
    file = folder / "arms.json"
    done: dict[str, Figures] = json.loads(file.read_text()) if file.exists() else {}
    for name, changes in arms.items():
        if name in done:
            continue
        done[name] = examined(dict(common) | dict(changes) | {"output_dir": str(folder / name)}, bool(changes))
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(done, indent=1))
        print(table(done, baseline), flush=True)
    return table({name: done[name] for name in arms}, baseline)


def examined(values: Mapping[str, Any], trained: bool) -> Figures:
    """One arm, from start to figures."""
    args = make_arguments(DistillArguments, values)
    exam = make_exam(args, *read_target(args))
    if exam is None:
        raise ValueError("arms are compared on held-out prompts: give eval_prompts=FILE")
    if not trained:
        paths = (args.target, args.student or args.target)
        return examine(exam, *(AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for path in paths))
    trainer = distill(args)
    if trainer.interrupt.stopped:
        raise KeyboardInterrupt
    return examine(exam, trainer.target, trainer.student.eval())


def examine(exam: Exam, target: Any, student: Any) -> Figures:
    graded = exam.grade(exam.sit(target, student))
    return {
        "greedy": exam.block_efficiencies(target, student, sampled=False),
        "sampled": exam.block_efficiencies(target, student, sampled=True),
        "acceptance": graded["acceptance"],
        "agreement": graded["agreement"],
    }


def table(done: Mapping[str, Figures], baseline: str) -> str:
    """Markdown: means over prompts with 95 % intervals, and ratios to the baseline, prompt by prompt."""
    lines = [
        f"| arm | greedy | sampled | greedy over {baseline} | sampled over {baseline} | acceptance | agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in done.items():
        kinds = ("greedy", "sampled")
        cells = [str(bootstrap_mean(arm[kind])) for kind in kinds]
        cells += [ratios(arm[kind], done[baseline][kind]) if baseline in done else "" for kind in kinds]
        cells += [f"{arm[key]:.3f}" for key in ("acceptance", "agreement")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def ratios(values: Sequence[float], base: Sequence[float]) -> str:
    return str(bootstrap_mean([value / other for value, other in zip(values, base, strict=True)]))
