"""The student and its loss against a frozen target in one forward: what DDP, FSDP and DeepSpeed wrap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from csdraft.data.feature_cache import LAST
from csdraft.data.packing import IGNORED
from csdraft.data.target_cache import dense
from csdraft.models import base_model
from csdraft.trainers.objective import Objective, head_of, hidden_of
from csdraft.trainers.split import states_of
from csdraft.trainers.students._kind import HeadKind, kind_of_head

__all__ = ["Distillation"]


class Distillation(nn.Module):
    """Reads a batch with both models and compares their next-token distributions where a label says so.

    What a drafting head compares, its kind says: see `csdraft.trainers.students._kind`.

    The loss is computed here, inside the wrapped module's forward, so that sharded parameters are there when the heads
    are applied.

    Args:
        student: trained.
        target: frozen. Not a submodule: it is neither wrapped, nor optimised, nor saved with the student.
        objective: the mixed loss, applied in chunks of positions.
        cached_taps: which hidden states of the target a batch holds as `cached`, side by side, for a head; see
            `csdraft.data.feature_cache`.
    """

    def __init__(self, student: nn.Module, target: nn.Module, objective: Objective, cached_taps: Sequence[int] = ()):
        super().__init__()
        self.student = student
        self.objective = objective
        self._target = (target.eval().requires_grad_(False),)
        self._kind, self._cached_taps = kind_of_head(student), tuple(cached_taps)
        if cached_taps and (missing := set(base_model(student).taps) - set(cached_taps)):
            raise ValueError(
                f"the cached features are of layers {list(cached_taps[:-1])} and lack {sorted(missing)}, which the "
                "head reads; write them with these layers, or train without target_cache"
            )
        self._heads = head_of(student) if self._kind is None else None, head_of(target)

    @property
    def target(self) -> nn.Module:
        return self._target[0]

    @property
    def config(self):
        """The student's: DeepSpeed chooses bucket sizes by its width."""
        return self.student.config

    def activation_checkpointing_enable(self, **options) -> None:
        self.student.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options) -> None:
        self.student.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def forward(self, labels: Tensor, total: Tensor | float, cached: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Sum of the loss over the labelled positions, divided by `total`.

        Args:
            labels: (rows, length) the token itself where its prediction counts, else `IGNORED`. A decoder-only model
                predicts token t after token t - 1; an encoder-decoder's labels are those of its decoder's outputs.
            total: labelled positions of the whole step, over micro-batches and processes.
            cached: (rows, length, 2 k) the target's top-k log-probabilities and ids, instead of its forward; see
                `csdraft.data.target_cache`.
            inputs: `input_ids` and `position_ids`, (rows, length); of an encoder-decoder `input_ids`,
                `attention_mask` and `decoder_input_ids`.
        """
        if self._kind is not None:
            return self._of_head(self._kind, labels, inputs, cached) / total
        after = 0 if "decoder_input_ids" in inputs else 1
        labels = labels[:, after:]
        scored = labels != IGNORED
        student = hidden_of(self.student, **inputs)[:, : labels.shape[1]][scored]
        student_head, target_head = self._heads
        if cached is not None:
            vocab = self.target.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
            target, target_head = cached[:, : labels.shape[1]][scored], partial(dense, vocab=vocab)
        else:
            place = self.target.device  # the head is there too; only logits go to the student
            with torch.no_grad():  # not inference_mode: the loss's backward may keep these
                read = hidden_of(self.target, **{name: value.to(place) for name, value in inputs.items()})  # type: ignore[arg-type]
            target = read[:, : labels.shape[1]][scored.to(read.device)]
        total_loss = self.objective.total(student, target, labels[scored], student_head, target_head)
        return total_loss / total

    def _of_head(self, kind: HeadKind, labels: Tensor, inputs: dict[str, Tensor], cached: Tensor | None) -> Tensor:
        """The sum of the loss of a head, over its drafting steps: the target's features come from its own forward."""
        head, place = base_model(self.student), self.target.device
        if cached is not None:
            parts = cached.to(place, self.target.dtype)  # type: ignore[call-overload]
            parts = parts.chunk(len(self._cached_taps), -1)
            states = dict(zip(self._cached_taps, parts, strict=True))
            hidden = states[LAST]
        else:
            with torch.no_grad():
                there = {name: value.to(place) for name, value in inputs.items()}  # type: ignore[arg-type]
                hidden, states = states_of(self.target, head.taps, **there)  # type: ignore[arg-type]
        total = torch.zeros((), device=labels.device)
        for part in kind.compared(head, states, hidden, self._heads[1], labels, inputs):
            if isinstance(part, Tensor):
                total = total + part
            else:
                total = total + part.weight * self.objective.total(*part[1:])
        return total
