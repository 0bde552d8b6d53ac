"""Which loss, which texts, which head: drafters trained for equal steps, compared prompt by prompt.

python -m benchmarks arms --config recipes/smol/arms.yaml
python -m benchmarks arms --config recipes/smol/heads.yaml
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from csdraft import ModelDrafter
from csdraft.data.shards import write_whole
from csdraft.metrics.intervals import bootstrap_ratio
from csdraft.schedules.fixed import Fixed
from csdraft.trainers.arguments import make_arguments, read_values
from csdraft.trainers.command import one_line_errors, recipe_parser
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.evaluation import Evaluation
from csdraft.trainers.run import check, distill, load_models, make_evaluation, read_target
from csdraft.trainers.run_folder import FINISHED
from csdraft.trainers.students import added_share

__all__ = ["compare_arms"]

Figures = dict[str, Any]
"""Of an arm: `greedy` and `sampled` block efficiency of each prompt, `acceptance` and `agreement` over all, the
`parameters` that it adds to the target, a drafting step's `price` in forwards of the target, and `speed`, plain
decoding's processor time over that with the default schedule."""

PRICED = 8
"""Prompts that are timed."""
RECORD = "arm.json"
"""In an arm's folder: the settings that it was begun with and, when it is done, its figures."""
WITHOUT_EFFECT = {"output_dir", "threads", "disable_tqdm", "logging_steps", "report_to", "save_total_limit"}
"""Keys that may change without the figures being made again."""


def compare_arms(common: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """Trains and examines every arm that is not yet done with these settings.

    Args:
        common: of `DistillArguments`. Every arm trains in `output_dir/<arm>`, where a killed run continues and the
            figures are kept. An arm whose settings have changed begins again; models and texts are known by their
            names, so that another `output_dir` is wanted when what stands in them has changed.
        arms: by name, the keys that an arm changes; one that changes none is the start, untrained.
        baseline: arm that the others are compared with, prompt by prompt.

    Returns:
        A table.

    Raises:
        ValueError: before the first arm is begun, for settings of any arm that cannot work.
    """
    if baseline not in arms:
        raise ValueError(f"baseline={baseline!r} is none of the arms; give one of {', '.join(map(repr, arms))}")
    plan = {
        name: Arm(Path(common["output_dir"], name), {**common, **changes}, bool(changes))
        for name, changes in arms.items()
    }
    for arm in plan.values():
        arm.check()
    done: dict[str, Figures] = {}
    for name, arm in plan.items():
        found = arm.figures()
        done[name] = found or arm.run()
        if found is None:
            print(table(done, baseline), flush=True)
    return table(done, baseline)


@dataclass(frozen=True)
class Arm:
    """One way to train, or the start itself.

    Args:
        folder: it trains there.
        values: of `DistillArguments`.
        trained: False: the student as `values` make it.
    """

    folder: Path
    values: Mapping[str, Any]
    trained: bool

    @property
    def args(self) -> DistillArguments:
        """With which it trains: from its start, unless it was begun with these settings."""
        begun = self.record is not None and self.record["settings"] == self.settings
        again = {} if begun else {"resume_from_checkpoint": False}
        return make_arguments(DistillArguments, {**self.values, **again, "output_dir": str(self.folder)})

    @property
    def settings(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.values.items() if key not in WITHOUT_EFFECT}
        return json.loads(json.dumps({**kept, "trained": self.trained}))

    def check(self) -> None:
        args = self.args
        config, tokenizer = read_target(args)
        check(args, config, tokenizer)
        if make_evaluation(args, config, tokenizer) is None:
            raise ValueError("arms are compared on held-out prompts: give eval_prompts=FILE")
        if self.record is None and self.checkpoints():
            raise ValueError(f"{self.folder} holds checkpoints of another run; give another output_dir, or remove it")

    @property
    def record(self) -> dict[str, Any] | None:
        file = self.folder / RECORD
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def note(self, figures: Figures | None) -> None:
        with write_whole(self.folder / RECORD) as file:
            file.write(json.dumps({"settings": self.settings, "figures": figures}, indent=1).encode())

    def checkpoints(self) -> list[Path]:
        return list(self.folder.glob("checkpoint-*"))

    def figures(self) -> Figures | None:
        """Of a run with these very settings, if there has been one."""
        record = self.record
        return record["figures"] if record is not None and record["settings"] == self.settings else None

    def run(self) -> Figures:
        """From start to figures."""
        if self.record is None or self.record["settings"] != self.settings:
            for checkpoint in self.checkpoints():
                shutil.rmtree(checkpoint)
            (self.folder / FINISHED).unlink(missing_ok=True)
            self.note(None)
        figures = self.examined()
        self.note(figures)
        return figures

    def examined(self) -> Figures:
        args = self.args
        config, tokenizer = read_target(args)
        evaluation = make_evaluation(args, config, tokenizer)
        assert evaluation is not None
        if self.trained:
            trainer = distill(args)
            if trainer.interrupt.stopped:
                raise KeyboardInterrupt
            return examine(evaluation, trainer.target, trainer.student.eval())
        if args.threads:
            torch.set_num_threads(args.threads)
        target, student = load_models(args, config)
        return examine(evaluation, target.eval(), student.to(args.device).eval())


def examine(evaluation: Evaluation, target: Any, student: Any) -> Figures:
    sums = evaluation.run(target, student)
    graded = evaluation.grade(sums)
    return {
        "greedy": evaluation.block_efficiencies(sums, "greedy"),
        "sampled": evaluation.block_efficiencies(sums, "sampled"),
        "acceptance": graded["acceptance"],
        "agreement": graded["agreement"],
        "parameters": round(added_share(student, target) * target.num_parameters()),
        **priced(evaluation, target, student),
    }


@torch.no_grad()
def priced(evaluation: Evaluation, target: Any, student: Any) -> Figures:
    """What a drafting step costs, and what the drafter gains, on one prompt at a time, plain and drafted in turns."""
    how = {"max_new_tokens": evaluation.new_tokens, "do_sample": False, "pad_token_id": evaluation.pad}
    drafted = {"assistant": ModelDrafter(student), "reuse": False}
    spent, seconds = [0.0, 0.0], ([], [])
    for number, prompt in enumerate(evaluation.prompts[: PRICED + 1]):
        ids = torch.tensor([prompt], device=target.device)
        for place, way in enumerate(({}, drafted)):
            began = time.process_time()
            target.generate(ids, **how, **way)
            spent[place] += time.process_time() - began if number else 0.0  # the first one warms up
        chain = target.generate(ids, **how, **drafted, schedule=Fixed(evaluation.depth), return_dict_in_generate=True)
        for place, use in enumerate(sorted(chain.report.models.items(), key=lambda item: item[0] != "target")):
            seconds[place].append(use[1].seconds / max(use[1].forwards, 1))
    theirs, own = map(median, seconds)
    return {"price": own / theirs, "speed": spent[0] / spent[1]}


def table(done: Mapping[str, Figures], baseline: str) -> str:
    """Markdown: means over prompts with 95 % intervals, and ratios to the baseline, prompt by prompt.

    python -m benchmarks arms --config recipes/smol/arms.yaml
    """
    lines = [
        f"| arm | greedy | sampled | greedy over {baseline} | sampled over {baseline} | acceptance | agreement "
        "| parameters | price | speed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in done.items():
        kinds = ("greedy", "sampled")
        cells = [mean(arm[kind]) for kind in kinds]
        cells += [ratios(arm[kind], done[baseline][kind]) if baseline in done else "" for kind in kinds]
        cells += [f"{arm[key]:.3f}" for key in ("acceptance", "agreement")]
        cells += [f"{arm['parameters'] / 1e6:.2f} M", f"{arm['price']:.2f}", f"{arm['speed']:.2f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def ratios(values: Sequence[float], base: Sequence[float]) -> str:
    return mean([value / other for value, other in zip(values, base, strict=True)])


def mean(values: Sequence[float]) -> str:
    """With its bootstrap interval."""
    return str(bootstrap_ratio(values, [1.0] * len(values)))


def main(argv: Sequence[str]) -> None:
    """Trains all arms of a recipe, or continues with them, and prints their table."""
    parser = recipe_parser(__doc__, DistillArguments, required=True)
    parser.prog = "python -m benchmarks arms"
    options = parser.parse_args(argv)
    values = read_values(options.config, options.overrides)
    if missing := [key for key in ("arms", "baseline", "output_dir") if key not in values]:
        parser.error(f"{options.config} lacks {', '.join(missing)}; recipes/smol/arms.yaml is an example")
    arms, baseline = values.pop("arms"), values.pop("baseline")
    with one_line_errors(values["output_dir"], __name__):
        print(compare_arms(values, arms, baseline))
