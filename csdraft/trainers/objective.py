"""What training minimises: a weighted sum of losses, computed in chunks of positions.

With a vocabulary of 150k, the logits of a 4k context take 2.5 GB in float32. A loss needs several such tensors, and a
backward pass needs them all at once. So the models return their last hidden states, and heads, losses and their
backward run chunk by chunk. Logits exist for one chunk only; the backward pass computes them again.

`Distillation` is the student and this loss in one forward: what DDP, FSDP and DeepSpeed wrap.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import csdraft.losses
from csdraft.data.target_cache import LAST, dense
from csdraft.decoding.feature_session import taps_of
from csdraft.models import base_model
from csdraft.spec import nearest
from csdraft.trainers.split import head_of, states_of
from csdraft.trainers.students._kind import student_of

__all__ = ["Distillation", "Objective", "losses"]

ToLogits = Callable[[Tensor], Tensor]
"""(positions, width) hidden states -> (positions, vocab) logits."""


def losses() -> list[str]:
    """The names of the losses, which are the files of csdraft/losses."""
    names = (module.name for module in pkgutil.iter_modules(csdraft.losses.__path__))
    return sorted(name for name in names if not name.startswith("_"))


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses between a student's and a target's next-token distributions.

    Args:
        losses: name -> weight, as in `{"forward_kl": 1.0, "cross_entropy": 0.1}`. A loss with options is written
            `{"jsd": {"weight": 1.0, "beta": 0.5}}`; its weight is 1 by default.
        student_temperature: divides the student's logits; losses are not multiplied by its square.
        target_temperature: divides the target's logits. Distil at the temperature at which drafts will be used
            (Temperature-KD, arXiv 2410.10141).
        chunk: positions whose logits are held at once, see `peak_bytes`. On a CPU, 128 to 512 were as fast as whole
            batches, although heads then run twice per step.

    Raises:
        ValueError: a loss or option is unknown, or a value is invalid.
    """

    losses: Mapping[str, float | Mapping[str, Any]]
    student_temperature: float = 1.0
    target_temperature: float = 1.0
    chunk: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise ValueError(f"losses={self.losses!r} must give weights to one or more of: {', '.join(losses())}")
        for name in ("student_temperature", "target_temperature"):
            _check_positive(name, getattr(self, name), "a number above 0")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk={self.chunk!r} must be a number of positions, 1 or more")
        for name, (_, loss) in zip(self.losses, self.terms, strict=True):  # the loss itself may refuse an option
            try:
                loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
            except TypeError as error:
                raise ValueError(f"{name}={self.losses[name]!r} has an option of the wrong type: {error}") from error

    @cached_property
    def terms(self) -> list[tuple[float, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
        """The weight of each loss, and its function with the options filled in."""
        return [_term(name, entry) for name, entry in self.losses.items()]

    def total(
        self,
        student_hidden: Tensor,
        target_hidden: Tensor,
        labels: Tensor,
        student_head: ToLogits,
        target_head: ToLogits,
    ) -> Tensor:
        """Sum of the loss over the positions. No gradient goes to the target.

        All processes must call it together and equally often. They agree on the number of chunks, because heads may
        be sharded: then all processes must call them together.

        Args:
            student_hidden: (positions, width) hidden states that the student's head reads.
            target_hidden: (positions, width of the target) hidden states that the target's head reads.
            labels: (positions,) int64, the next token at each.
            student_head: see `csdraft.trainers.split.head_of`; it must call the module, not multiply with its weight.
            target_head: likewise. If the two vocabularies differ by padding, the wider one is cut.

        Returns:
            () float32; without positions it is 0, and its gradients too.
        """
        count = self._agreed_chunks(len(labels), labels.device)
        once = count == 1 or not torch.is_grad_enabled()
        parts = []
        chunks = (tensor.tensor_split(count) for tensor in (student_hidden, target_hidden, labels))
        for student, target, wanted in zip(*chunks, strict=True):
            inputs = student, target, wanted, student_head, target_head
            parts.append(self._sum(*inputs) if once else checkpoint(self._sum, *inputs, use_reentrant=False))
        return torch.stack(parts).sum()

    def peak_bytes(self, vocab: int) -> int:
        """The most bytes that logits, losses and their backward pass take at once, for any number of positions.

        16 x (2 + number of losses) x chunk x vocab: each loss keeps up to four float32 tensors for its backward pass,
        and up to eight more exist, logits among them. A single loss other than `jsd` needs two thirds of that. Extra
        steps of a head (Gemma 2's soft cap) and the gradient of its weight are not counted.
        """
        return 16 * (2 + len(self.losses)) * self.chunk * vocab

    def _sum(
        self, student: Tensor, target: Tensor, labels: Tensor, student_head: ToLogits, target_head: ToLogits
    ) -> Tensor:
        """Sum over one chunk; `student` and `target` are hidden states, (positions, width)."""
        with torch.no_grad():
            target = target_head(target)
        student = student_head(student)
        width = min(student.shape[-1], target.shape[-1])
        student = _tempered(student[:, :width], self.student_temperature)  # (positions, vocab)
        target = _tempered(target[:, :width].to(student.device), self.target_temperature)
        return torch.stack([weight * loss(student, target, labels).sum() for weight, loss in self.terms]).sum()

    def _agreed_chunks(self, positions: int, device: torch.device) -> int:
        """The number of chunks that the process with the most positions needs."""
        count = max(1, math.ceil(positions / self.chunk))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            most = torch.tensor(count, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            count = int(most)
        return count


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _term(name: str, entry: Any) -> tuple[float, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    if name not in (known := losses()):
        raise ValueError(f"no loss {name!r}: {nearest(name, known)}")
    function = getattr(importlib.import_module(f"csdraft.losses.{name}"), name)
    options = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
    weight = options.pop("weight", 1.0)
    _check_positive(f"weight of {name}", weight, "a number above 0; leave the loss out otherwise")
    parameters = inspect.signature(function).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}: {nearest(option, ['weight', *allowed])}")
    return float(weight), partial(function, **options)


def _check_positive(name: str, value: Any, expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be {expected}")


# The student and its loss in one forward.


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
