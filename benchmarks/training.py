"""What the trainer adds to a bare loop of the same forwards, backward and optimiser steps.

python -m benchmarks training --config recipes/smol/distill.yaml
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader

from csdraft.data.packing import IGNORED, Shuffled
from csdraft.metrics.intervals import Interval, bootstrap_median
from csdraft.trainers.arguments import make_arguments, read_values
from csdraft.trainers.command import recipe_parser
from csdraft.trainers.distill import DistillArguments, DrafterTrainer
from csdraft.trainers.run import load_models, prepare
from csdraft_command import COUNT

__all__ = ["trainer_overhead"]

MOST = 1.10
"""Times a bare loop that the trainer may take."""


def trainer_overhead(values: Mapping[str, Any], steps: int = 12, repetitions: int = 5) -> tuple[Interval, float]:
    """Seconds of the trainer over seconds of the loop, taken in turns on the same batches; and tokens a second.

    Both train a copy of the same student with forward KL and AdamW, logits at scored positions only. The loop knows
    nothing of packing, chunks, schedules or logs, and takes all positions of a step at once.

    Args:
        values: of `DistillArguments`; evaluation and checkpoints are switched off.
        steps: of each turn.
        repetitions: turns of each; the first of each is not counted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        fixed = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        fixed |= {"output_dir": scratch, "muon": False, "eval_prompts": None, "on_policy": 0.0, "disable_tqdm": True}
        args = make_arguments(DistillArguments, dict(values) | fixed)
        config, tokenizer, batches = prepare(args)
        target, student = load_models(args, config)
        order = Shuffled(len(batches["train_dataset"]), args.seed)
        loader = DataLoader(batches["train_dataset"], args.train_batch_size, sampler=order,
                            collate_fn=batches["data_collator"])  # fmt: skip
        ratios = []
        for repetition in range(repetitions + 1):
            trainer = DrafterTrainer(
                copy.deepcopy(student), args, target=target, processing_class=tokenizer, **batches
            )
            ours = trainer.train().metrics["train_runtime"]
            theirs = bare_loop(copy.deepcopy(student), target, loader, args)
            if repetition:
                ratios.append([ours / theirs])
        tokens = steps * args.train_batch_size * args.max_length
        return bootstrap_median(ratios), tokens / ours


def bare_loop(student: nn.Module, target: nn.Module, loader: DataLoader, args: DistillArguments) -> float:
    """Seconds of `args.max_steps` steps."""
    optimizer = torch.optim.AdamW(student.parameters(), args.learning_rate)
    student.train()
    started = time.perf_counter()
    for _, batch in zip(range(args.max_steps), loader, strict=False):
        scored = batch.pop("labels")[:, 1:] != IGNORED
        with torch.no_grad():
            p = log_softmax(scored_logits(target, batch, scored), -1)
        q = log_softmax(scored_logits(student, batch, scored), -1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def scored_logits(model: Any, batch: Mapping[str, Any], scored: torch.Tensor) -> torch.Tensor:
    """(scored, vocab) float32 logits, made at the positions that count and nowhere else, as the trainer does."""
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    return model.get_output_embeddings()(hidden[scored]).float()


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit status is 0 if the trainer costs at most MOST times a bare loop."""
    parser = recipe_parser(__doc__, DistillArguments, required=True)
    parser.prog = "python -m benchmarks training"
    parser.add_argument("--steps", type=COUNT, default=12, help="of each turn")
    parser.add_argument("--repetitions", type=COUNT, default=5, help="turns of each")
    options = parser.parse_args(argv)
    values = read_values(options.config, options.overrides)
    ratio, tokens = trainer_overhead(values, options.steps, options.repetitions)
    print(f"trainer over bare loop: {ratio}; {tokens:,.0f} tokens/s of packed blocks")
    passed = ratio.median <= MOST
    print("PASS" if passed else "FAIL", f"at most {MOST:.2f} times a bare loop")
    return 0 if passed else 1
