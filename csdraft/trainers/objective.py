"""What training minimises: losses mixed by weight, computed a chunk of positions at a time.

At a vocabulary of 150k the logits of a 4k context take 2.5 GB in float32, a loss needs several such tensors, and a
backward needs them all at once. So the models hand over their last hidden states, and heads, losses and their backward
run chunk by chunk; logits exist of one chunk only, and are computed again when the backward comes to it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import csdraft.losses
from csdraft.spec import nearest
from csdraft.trainers.split import head_of, hidden_of

__all__ = ["Objective", "head_of", "hidden_of", "losses"]

ToLogits = Callable[[Tensor], Tensor]
"""(positions, width) hidden states -> (positions, vocab) logits."""


def losses() -> list[str]:
    """The names of the losses: those of the files of csdraft/losses."""
    names = (module.name for module in pkgutil.iter_modules(csdraft.losses.__path__))
    return sorted(name for name in names if not name.startswith("_"))


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses between a student's and a target's next-token distributions.

    Args:
        losses: weights by name, as in `{"forward_kl": 1.0, "cross_entropy": 0.1}`; a loss with options is written
            `{"jsd": {"weight": 1.0, "beta": 0.5}}`, its weight 1 if not said.
        student_temperature: divides the student's logits; losses are not multiplied by its square.
        target_temperature: divides the target's logits. Distil at the temperature at which drafts will be used
            (Temperature-KD, arXiv 2410.10141).
        chunk: positions whose logits are held at once, see `peak_bytes`. On a CPU 128 to 512 measured as fast as whole
            batches, whose heads run once a step and not twice.

    Raises:
        ValueError: for an unknown loss or option, and for a value that makes no sense.
    """

    losses: Mapping[str, float | Mapping[str, Any]]
    student_temperature: float = 1.0
    target_temperature: float = 1.0
    chunk: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise ValueError(f"losses={self.losses!r} must give a weight to each of some of: {', '.join(losses())}")
        for name in ("student_temperature", "target_temperature"):
            _check_positive(name, getattr(self, name), "a number above 0")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk={self.chunk!r} must be a number of positions, 1 or more")
        for name, (_, loss) in zip(self.losses, self.terms, strict=True):  # options that the loss itself refuses
            try:
                loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
            except TypeError as error:
                raise ValueError(f"{name}={self.losses[name]!r} has an option of the wrong kind: {error}") from error

    @cached_property
    def terms(self) -> list[tuple[float, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
        """Weight and function of each loss, its options filled in."""
        return [_term(name, entry) for name, entry in self.losses.items()]

    def total(
        self,
        student_hidden: Tensor,
        target_hidden: Tensor,
        labels: Tensor,
        student_head: ToLogits,
        target_head: ToLogits,
    ) -> Tensor:
        """Sum of the loss over all positions given, so give those only that count. No gradient goes to the target.

        With several processes all must call it together, as often: they agree on the number of chunks, because the
        heads may be sharded, and then each call of one is a call of all.

        Args:
            student_hidden: (positions, width) hidden states that the student's head reads.
            target_hidden: (positions, width of the target) likewise.
            labels: (positions,) int64, the next token at each.
            student_head: see `head_of`; must be a module's own call, not a product with its weight.
            target_head: likewise. Where the two vocabularies differ by padding, the wider is cut.

        Returns:
            () float32; of no positions it is 0, with gradients that are 0.
        """
        count = self._agreed_chunks(len(labels), labels.device)
        once = count == 1 or not torch.is_grad_enabled()
        heads = student_head, target_head
        parts = []
        for rows in _slices(len(labels), count):
            of = student_hidden[rows], target_hidden[rows], labels[rows], *heads
            parts.append(self._sum(*of) if once else checkpoint(self._sum, *of, use_reentrant=False))
        return torch.stack(parts).sum()

    def peak_bytes(self, vocab: int) -> int:
        """The most that logits, losses and their backward take at once, whatever the number of positions.

        16 x (2 + number of losses) x chunk x vocab: of each loss up to four float32 tensors wait for its backward, and
        there are up to eight more, the logits among them; one loss but `jsd` needs two thirds. What else a head does
        (Gemma 2's soft cap) and the gradient of its weight come on top.

        Args:
            vocab: tokens.
        """
        return 16 * (2 + len(self.losses)) * self.chunk * vocab

    def _sum(
        self, student: Tensor, target: Tensor, labels: Tensor, student_head: ToLogits, target_head: ToLogits
    ) -> Tensor:
        """Sum over one chunk; the first two are hidden states."""
        with torch.no_grad():
            target = target_head(target)
        student = student_head(student)
        width = min(student.shape[-1], target.shape[-1])
        student = _tempered(student[:, :width], self.student_temperature)
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


def _slices(positions: int, count: int) -> Iterator[slice]:
    """`count` runs of about equal length, empty ones at the end where there are too few positions."""
    size = math.ceil(positions / count)
    return (slice(i * size, (i + 1) * size) for i in range(count))


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
