"""The demo's first half: a drafter cut out of the target is distilled while you wait."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill
from csdraft.trainers.students import make_student

__all__ = ["distilled_pair"]

CORPUS, TEXTS, LENGTH = "stdlib", 160, 256
"""What is learned from: so many texts of it, in blocks of so many tokens."""
STEPS, ROWS = 180, 8
DRAFTER = "demo-drafter"
"""Folder that each demo replaces."""


def distilled_pair(
    path: str, target: PreTrainedModel, layers: list[int], prompts: str, out: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A drafter of some of the target's own layers, before and after distillation.

    Args:
        path: of the target.
        target: the same, loaded.
        layers: copied into the drafter.
        prompts: held out, for block efficiency while it trains.
        out: folder for the drafter; what an earlier demo left there is replaced.
    """
    shutil.rmtree(out / DRAFTER, ignore_errors=True)
    quieten()
    print(f"A drafter made of the target's layers {layers} learns to choose as the target does.", flush=True)
    init = {"from_target": {"layers": layers}}
    before = make_student(target, init=init).eval()
    arguments = DistillArguments(
        target=path, target_dtype="float32", init=init, dataset=CORPUS, dataset_limit=TEXTS, max_length=LENGTH,
        losses={"forward_kl": 1.0}, chunk=ROWS * LENGTH, output_dir=str(out / DRAFTER), max_steps=STEPS,
        per_device_train_batch_size=ROWS, muon=True, learning_rate=4e-3, lr_scheduler_type="linear", warmup_steps=5,
        weight_decay=0.1, use_cpu=True, save_strategy="no", report_to="none", logging_steps=5,
        eval_prompts=prompts, eval_limit=6, eval_new_tokens=48, per_device_eval_batch_size=6, eval_on_start=True,
        eval_strategy="steps", disable_tqdm=False, eval_steps=STEPS // 4,
    )  # fmt: skip
    trainer = distill(arguments)
    if trainer.interrupt.stopped:
        raise KeyboardInterrupt
    after = AutoModelForCausalLM.from_pretrained(out / DRAFTER, dtype=target.dtype).eval()
    return before, after


def quieten() -> None:
    """Leaves the screen to the demo's own line: no bars of datasets, and of DeepSpeed, if it is there, errors only."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
