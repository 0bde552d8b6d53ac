"""The chat demo's first half: the target answers questions, and four of its layers are distilled on the answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from csdraft.cascade import drafter_model
from csdraft.data.generate import GenerateArguments, generate
from csdraft.drafters.max_gram import MaxGram
from csdraft.trainers.arguments import make_arguments, read_values
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill
from examples.demo_distill import quieten

__all__ = ["DATA", "DISTILL", "Student", "distilled"]

DATA, DISTILL = "recipes/smollm2/data.yaml", "recipes/smollm2/distill.yaml"
MOST_ROWS, FEWEST_ROWS, ROW_TOKENS, BATCH = 76, 12, 72, 16
"""Answers that the target writes, of so many tokens, and how many at once."""
MOST_STEPS, FEWEST_STEPS, TEXTS, LENGTH = 120, 8, 2, 256
"""Steps of the training, on so many blocks of so many tokens each."""
WRITING_SECONDS, TRAINING_SECONDS = 70.0, 150.0
"""About what each may take: it sets rows and steps."""
BATCH_GAIN = 4.0
"""Tokens a second of a batch over those of one row, with which the time of writing is forecast."""
STEP_FORWARDS = 2.2
"""Seconds of a training step in those of the target's forward over as many tokens."""


@dataclass(frozen=True)
class Student:
    """What was distilled.

    Attributes:
        folder: its weights, without the target's embedding.
        network: it, with the target's embedding: what transformers takes as assistant_model.
        before, after: the evaluation's figures, `block_efficiency` and `agreement` among them.
        share: seconds of its forward of one token over the target's.
        tokens: that the target wrote, and that were read in all steps.
    """

    folder: Path
    network: PreTrainedModel
    before: dict[str, float]
    after: dict[str, float]
    share: float
    tokens: tuple[int, int]


def distilled(path: str, target: Any, dtype: str, out: Path) -> Student:
    """Lets the target write, distils a student on it, and says how long both should take; replaces an earlier one.

    Args:
        path: of the target.
        target: the same, loaded.
        dtype: of the target.
        out: folder for both.
    """
    for name in ("written", "drafter"):
        shutil.rmtree(out / name, ignore_errors=True)
    quieten()
    written = write(path, target, dtype, out / "written")
    steps = steps_in_time(target)
    layers = chosen_layers(target.config.num_hidden_layers)
    arguments = DistillArguments(**training(path, dtype, layers, out, steps))
    print(f"A student of its layers {layers} learns to answer as it does: {steps} steps of {TEXTS * LENGTH} tokens, "
          f"about {steps * step_seconds(target):.0f} s, and two evaluations.", flush=True)  # fmt: skip
    trainer = distill(arguments)
    if trainer.interrupt.stopped:
        raise KeyboardInterrupt
    graded = [entry for entry in trainer.state.log_history if "eval_block_efficiency" in entry]
    before, after = ({key.removeprefix("eval_"): value for key, value in graded[i].items()} for i in (0, -1))
    stored: Any = drafter_model(str(out / "drafter"), dtype=dtype)
    network = stored.bind(target)
    share = forward_seconds(network, 1) / forward_seconds(target, 1)
    return Student(out / "drafter", network, before, after, share, (written, steps * TEXTS * LENGTH))


def write(path: str, target: Any, dtype: str, folder: Path) -> int:
    """The target answers the recipe's questions, as many as there is time for; returns the number of tokens."""
    rate = BATCH_GAIN / forward_seconds(target, 1)
    rows = max(FEWEST_ROWS, min(MOST_ROWS, int(WRITING_SECONDS * rate / ROW_TOKENS) // 4 * 4))
    print(f"The target answers {rows} questions, to learn from: about {rows * ROW_TOKENS / rate:.0f} s.", flush=True)
    changes = {"target": path, "target_dtype": dtype, "output_dir": str(folder), "count": rows}
    changes |= {"max_new_tokens": ROW_TOKENS, "batch_size": BATCH}
    made = generate(make_arguments(GenerateArguments, read_values(DATA, []) | changes), MaxGram())
    return sum(len(row["input_ids"]) - row["prompt_length"] for row in made)


def chosen_layers(count: int) -> list[int]:
    """Of a model of so many layers: the first two, the middle one and the last, as the recipe has them of 30."""
    return sorted({0, min(1, count - 1), count // 2, count - 1})


def training(path: str, dtype: str, layers: Sequence[int], out: Path, steps: int) -> dict[str, Any]:
    """The recipe's keys, but for those that a longer run has otherwise."""
    return read_values(DISTILL, []) | {
        "init": {"from_target": {"layers": list(layers), "tie_to_target": True}},
        "target": path, "target_dtype": dtype, "dataset": str(out / "written"), "output_dir": str(out / "drafter"),
        "max_steps": steps, "per_device_train_batch_size": TEXTS, "max_length": LENGTH, "warmup_steps": 2,
        "eval_limit": 4, "eval_new_tokens": 32, "eval_steps": steps, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": False,
    }  # fmt: skip


def steps_in_time(target: Any) -> int:
    return max(FEWEST_STEPS, min(MOST_STEPS, int(TRAINING_SECONDS / step_seconds(target))))


def step_seconds(target: Any) -> float:
    return STEP_FORWARDS * forward_seconds(target, TEXTS * LENGTH)


@torch.no_grad()
def forward_seconds(model: Any, tokens: int) -> float:
    """Of a forward over so many tokens without a text before them; the faster of two."""
    ids, seconds = torch.arange(tokens)[None] % model.config.vocab_size, []
    for _ in range(2):
        began = time.perf_counter()
        model(ids)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
