"""The demo's first half: a drafter cut out of the target is distilled while you wait."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from csdraft.data.generate import GenerateArguments, generate
from csdraft.drafters.max_gram import MaxGram
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.run import distill
from csdraft.trainers.students import make_student

__all__ = ["distilled_pair"]

TEXTS, BEGIN, NEW = 240, 64, 96
"""What the target writes to learn from: texts, and tokens given and written of each."""
STEPS, ROWS = 120, 8
WRITTEN, DRAFTER = "demo-written", "demo-drafter"
"""Folders that each demo replaces."""


def distilled_pair(path: str, target: PreTrainedModel, layers: list[int], prompts: str, out: Path) -> tuple:
    """A drafter of some of the target's own layers, before and after distillation.

    Args:
        path: of the target.
        target: the same, loaded.
        layers: copied into the drafter.
        prompts: held out, for block efficiency while it trains.
        out: folder for texts and drafter; what an earlier demo left there is replaced.
    """
    for name in (WRITTEN, DRAFTER):
        shutil.rmtree(out / name, ignore_errors=True)
    print(f"1. The target writes {TEXTS} short texts, drafting with MaxGram.", flush=True)
    written = GenerateArguments(
        target=path, target_dtype="float32", dataset="stdlib", count=TEXTS, begin=BEGIN, max_new_tokens=NEW,
        sampled=0.5, output_dir=str(out / WRITTEN), batch_size=16,
    )  # fmt: skip
    generate(written, MaxGram())
    print(f"2. A drafter made of the target's layers {layers} learns to choose as it does.", flush=True)
    before = make_student(target, init={"from_target": {"layers": layers}}).eval()
    arguments = DistillArguments(
        target=path, target_dtype="float32", init={"from_target": {"layers": layers}}, dataset=str(out / WRITTEN),
        max_length=2 * (BEGIN + NEW), losses={"forward_kl": 1.0}, chunk=8192, output_dir=str(out / DRAFTER),
        max_steps=STEPS, per_device_train_batch_size=ROWS, muon=True, learning_rate=2e-3, lr_scheduler_type="linear",
        warmup_steps=5, weight_decay=0.1, use_cpu=True, save_strategy="no", report_to="none", logging_steps=5,
        eval_prompts=prompts, eval_limit=6, eval_new_tokens=48, per_device_eval_batch_size=6, eval_on_start=True,
        eval_strategy="steps", disable_tqdm=False, eval_steps=30,
    )  # fmt: skip
    trainer = distill(arguments)
    if trainer.interrupt.stopped:
        raise KeyboardInterrupt
    after = AutoModelForCausalLM.from_pretrained(out / DRAFTER, dtype=target.dtype).eval()
    return before, after
