"""The student and its loss against a frozen target in one forward: what DDP, FSDP and DeepSpeed wrap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from csdraft.data.target_cache import LAST, dense
from csdraft.decoding.feature_session import taps_of
from csdraft.models import base_model
from csdraft.trainers.objective import Objective
from csdraft.trainers.split import head_of, states_of
from csdraft.trainers.students._kind import student_of

__all__ = ["Distillation"]


class Distillation(nn.Module):
    """Reads a batch with both models and compares their next-token distributions at the labelled positions.

    `Student.compared` of the student's kind says what is compared. The loss is computed inside the wrapped module's
    forward, where sharded parameters are whole.

    Args:
        student: the model to train.
        target: frozen. Not a submodule: it is neither wrapped, nor optimised, nor saved with the student.
        objective: the mixed loss, applied in chunks of positions.
        cached_taps: which hidden states of the target a batch's `cached` holds, concatenated, for a head; see
            `csdraft.data.target_cache`.
    """

    def __init__(self, student: nn.Module, target: nn.Module, objective: Objective, cached_taps: Sequence[int] = ()):
        super().__init__()
        self.student = student
        self.objective = objective
        self._target = (target.eval().requires_grad_(False),)
        self._kind, self._taps = student_of(student), taps_of(base_model(student))
        self._target_logits, self._cached_taps = head_of(target), tuple(cached_taps)
        if not self._taps:
            head_of(student)  # tries it now, before an engine wraps the student
        if cached_taps and (missing := set(self._taps) - set(cached_taps)):
            raise ValueError(
                f"the cached features are of layers {list(cached_taps[:-1])} and lack {sorted(missing)}, which the "
                "head reads; write them with these layers, or train without target_cache"
            )

    @property
    def target(self) -> nn.Module:
        return self._target[0]

    @property
    def config(self):
        """The student's config: DeepSpeed derives bucket sizes from its width."""
        return self.student.config

    def activation_checkpointing_enable(self, **options) -> None:
        self.student.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options) -> None:
        self.student.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def forward(self, labels: Tensor, total: Tensor | float, cached: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Sum of the loss over the labelled positions, divided by `total`.

        Args:
            labels: (rows, length) token ids where the prediction counts, else `IGNORED`; see `Student.compared`.
            total: labelled positions of the whole step, over micro-batches and processes.
            cached: (rows, length, 2 k) the target's top-k log-probabilities and ids, which replace its forward, see
                `TargetCache.packed`; or (rows, length, taps x width) its hidden states, see `cached_taps`.
            inputs: `input_ids` and `position_ids`, (rows, length); for an encoder-decoder `input_ids`,
                `attention_mask` and `decoder_input_ids`.
        """
        if cached is not None and self._cached_taps:
            parts = cached.to(self.target.device, self.target.dtype)  # type: ignore[call-overload]
            states = dict(zip(self._cached_taps, parts.chunk(len(self._cached_taps), -1), strict=True))
            hidden, target_logits = states[LAST], self._target_logits
        elif cached is not None:
            vocab = self.target.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
            hidden, states, target_logits = cached, {}, partial(dense, vocab=vocab)
        else:
            place, target_logits = self.target.device, self._target_logits
            with torch.no_grad():  # not inference_mode: the loss's backward may need these
                there = {name: value.to(place) for name, value in inputs.items()}  # type: ignore[arg-type]
                hidden, states = states_of(self.target, self._taps, **there)
        loss = torch.zeros((), device=labels.device)
        for part in self._kind.compared(self.student, states, hidden, target_logits, labels, inputs):
            if isinstance(part, Tensor):
                loss = loss + part
            else:
                loss = loss + part.weight * self.objective.total(*part[1:])
        return loss / total
