"""What the steps of a run came to: the loss over all processes, exactly and at once, and the tokens that were read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps"]


class Steps:
    """Collects the losses of a step's micro-batches, closes the step, and keeps the mean since the last log.

    The trainer of transformers keeps one sum on each process. It hides nan in it (`logging_nan_inf_filter`), and a
    resumed run starts it again, so that the first figure it logs is another than that of an uninterrupted run.

    Attributes:
        loss: of the last step, over all processes; nan before the first.
        tokens: that this process read in the current step, filling included.
        table: (processes, micro-batches) losses of the last step.
    """

    def __init__(self) -> None:
        self.loss, self.tokens = math.nan, 0
        self.table: list[list[float]] = []
        self._parts: list[Tensor] = []
        self._sum, self._count = 0.0, 0

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """A step of these micro-batches begins."""
        self._parts.clear()
        self.tokens = sum(
            batch[name].numel() for batch in batches for name in ("input_ids", "decoder_input_ids") if name in batch
        )

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch, scaled so that those of a step add up; their mean over the processes counts."""
        self._parts.append(loss.detach().float())

    def close(self, accelerator: Any) -> None:
        """The step is done: every process gets all losses. All processes must call it."""
        own = torch.stack(self._parts)
        self.table = accelerator.gather(own).view(-1, len(own)).tolist()
        self.loss = sum(map(sum, self.table)) / len(self.table)
        self._sum, self._count = self._sum + self.loss, self._count + 1

    def mean(self) -> float:
        """The mean loss of the steps since this was last asked."""
        mean = self._sum / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean

    @property
    def unlogged(self) -> list[float]:
        """What a checkpoint keeps: sum and number of the losses that have not been logged yet."""
        return [self._sum, self._count]

    @unlogged.setter
    def unlogged(self, kept: Sequence[float]) -> None:
        self._sum, self._count = kept[0], int(kept[1])
