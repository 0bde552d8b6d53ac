"""A head of every kind that has learned to draft for the tiny target: what the laws of heads are tested on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csdraft.trainers.objective import Distillation, Objective
from csdraft.trainers.students import make_student
from csdraft.trainers.students._kind import kinds
from tests.heads.learned import target, texts

NAMES = sorted(kinds())
OBJECTIVE = Objective({"forward_kl": 1.0}, chunk=1024)  # all of `texts()` at once, so that none is computed twice
OPTIONS: dict[str, dict[str, Any]] = {"eagle3": {"layers": [0, 1, 3]}, "parallel": {"layers": [0, 1, 3]}}
OPTIONS["dflash"] = {"layers": [1, 2, 3], "blocks": 2}
OPTIONS["ctc"] = {"layers": [0, 1, 3], "frames": 5}
"""What a tiny target needs; all else as by default."""


def new(name: str, seed: int = 0, **options: Any) -> Any:
    """A head for `target()`; it drafts 60 of its tokens unless asked for another number."""
    torch.manual_seed(seed)
    given = {"draft_vocab": 60, "steps": 3} | OPTIONS.get(name, {}) | options
    made = make_student(target(), init={name: given}, counts=lambda: texts().flatten().bincount(minlength=97))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "norm" in key:  # a bug must not hide behind a one
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def weights_in(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The one file of a stored head's tensors, and what it holds."""
    (file,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))
    return file, torch.load(file) if file.suffix == ".pt" else load_file(file)


def write_weights(file: Path, state: dict[str, Tensor]) -> None:
    """Other tensors in that file."""
    if file.suffix == ".pt":
        torch.save(state, file)
    else:
        save_file(state, file)


def batch(every: int = 1) -> dict[str, Any]:
    """What a training step reads of `texts()`, or of one in so many: one in five is greedy."""
    ids = texts()[::every]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "labels": ids, "total": float(ids.numel())}


@cache
def learned(name: str, steps: int | None = None, **options: Any) -> Any:
    """A head that drafts what the target writes here, often; tests must not change it.

    It learns from the greedy texts: 30 steps teach as much as 70 on every other text, in a fifth of the time.
    """
    made = new(name, **options)
    step = Distillation(made, target(), OBJECTIVE).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 0.015)
    greedy = batch(every=5)
    for _ in range(steps or (50 if name == "dflash" else 30)):
        optimizer.zero_grad()
        step(**greedy).backward()
        optimizer.step()
    return made.eval().requires_grad_(False)
