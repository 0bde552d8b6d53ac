"""The order in which a training reads its rows, and the losses of its steps."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from csdraft.data.packing import IGNORED

__all__ = ["Filled", "Shuffled", "Steps"]


class Shuffled(Sampler):
    """All indices of a data set, in a new order every epoch, and then indices past its end; see `Filled`.

    The trainer itself sets the epoch (`set_epoch`). accelerate (1.15) cannot: with several processes, its loader that
    skips the batches a resumed run has read hides the sampler.

    Args:
        multiple: rows that the processes read together. The order is filled up to a multiple of it; otherwise
            accelerate would fill it up with rows that have been read already.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1):
        self.size, self.seed, self.epoch = size, seed, 0
        self.missing = -size % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + self.missing

    def __iter__(self) -> Iterator[int]:
        """The order of this epoch."""
        yield from random.Random(f"{self.seed} {self.epoch}").sample(range(self.size), self.size)
        yield from range(self.size, len(self))

    def batch(self, number: int, rows: int) -> list[int]:
        """The items of the data set in one batch of this epoch, counted over all processes, which take turns."""
        return [index for index in islice(self, number * rows, (number + 1) * rows) if index < self.size]


class Filled(Dataset):
    """A data set of items with `labels`, and any number of extra items that have no labels to learn."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.data):
            return self.data[index]
        item = self.data[0]
        return item | {"labels": torch.full_like(item["labels"], IGNORED)}


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
        """Begins a step of these micro-batches."""
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
