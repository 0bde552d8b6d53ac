"""The losses of a run's steps, over all processes, and the number of tokens read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps"]


class Steps:
    """Collects the losses of a step's micro-batches, and keeps the mean since the last log.

    The trainer of transformers keeps a sum on each process. It hides nan in it (`logging_nan_inf_filter`), and a
    resumed run starts it at zero, so that its first logged loss differs from that of an uninterrupted run.

    Attributes:
        loss: of the last step, over all processes; nan before the first.
        tokens: that this process read in the current step, padding included.
        table: (processes, micro-batches) losses of the last step.
        unlogged: sum and number of the losses since the last log; checkpoints keep it.
    """

    def __init__(self) -> None:
        self.loss, self.tokens = math.nan, 0
        self.table: list[list[float]] = []
        self.unlogged = [0.0, 0]
        self._parts: list[Tensor] = []

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """A step of these micro-batches begins."""
        self._parts.clear()
        self.tokens = sum(
            batch[name].numel() for batch in batches for name in ("input_ids", "decoder_input_ids") if name in batch
        )

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, scaled so that those of a step add up."""
        self._parts.append(loss.detach().float())

    def close(self, accelerator: Any) -> None:
        """Ends the step: every process gets all losses. All processes must call it."""
        own = torch.stack(self._parts)  # (micro-batches,)
        self.table = accelerator.gather(own).view(-1, len(own)).tolist()
        self.loss = sum(map(sum, self.table)) / len(self.table)
        total, count = self.unlogged
        self.unlogged = [total + self.loss, count + 1]

    def mean(self) -> float:
        """The mean loss of the steps since the last call."""
        total, count = self.unlogged
        self.unlogged = [0.0, 0]
        return total / count if count else math.nan
