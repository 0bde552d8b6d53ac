"""The student and its loss against a frozen target in one forward: what DDP, FSDP and DeepSpeed wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csdraft.data.packing import IGNORED
from csdraft.trainers.objective import Objective, head_of, hidden_of

__all__ = ["Distillation"]


class Distillation(nn.Module):
    """Reads a batch with both models and compares their next-token distributions where a label says so.

    The loss is computed here, inside the wrapped module's forward, so that sharded parameters are there when the heads
    are applied.

    Args:
        student: trained.
        target: frozen. Not a submodule: it is neither wrapped, nor optimised, nor saved with the student.
        objective: the mixed loss, applied in chunks of positions.
    """

    def __init__(self, student: nn.Module, target: nn.Module, objective: Objective):
        super().__init__()
        self.student = student
        self.objective = objective
        self._target = (target.eval().requires_grad_(False),)
        self._heads = head_of(student), head_of(target)

    @property
    def target(self) -> nn.Module:
        return self._target[0]

    @property
    def config(self):
        """The student's: DeepSpeed chooses bucket sizes by its width."""
        return self.student.config

    def gradient_checkpointing_enable(self, **options) -> None:
        self.student.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def forward(self, labels: Tensor, total: Tensor | float, **inputs: Tensor) -> Tensor:
        """Sum of the loss over the labelled positions, divided by `total`.

        Args:
            labels: (rows, length) the token itself where its prediction counts, else `IGNORED`. A decoder-only model
                predicts token t after token t - 1; an encoder-decoder's labels are those of its decoder's outputs.
            total: labelled positions of the whole step, over micro-batches and processes.
            inputs: `input_ids` and `position_ids`, (rows, length); of an encoder-decoder `input_ids`,
                `attention_mask` and `decoder_input_ids`.
        """
        after = 0 if "decoder_input_ids" in inputs else 1
        labels = labels[:, after:]
        scored = labels != IGNORED
        student = hidden_of(self.student, **inputs)[:, : labels.shape[1]][scored]
        with torch.no_grad():  # not inference_mode: the loss's backward may keep these
            target = hidden_of(self.target, **inputs)[:, : labels.shape[1]][scored]
        return self.objective.total(student, target.to(student.device), labels[scored], *self._heads) / total
