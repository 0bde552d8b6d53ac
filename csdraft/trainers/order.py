"""The order in which a run reads its data. It depends on seed and epoch only, not on the number of processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from csdraft.data.packing import IGNORED

__all__ = ["Filled", "Shuffled"]


class Shuffled(Sampler):
    """All indices of a data set, in a new order every epoch, and then indices past its end; see `Filled`.

    The trainer itself sets the epoch (`set_epoch`). accelerate (1.15) cannot: with several processes, its loader that
    skips the batches a resumed run has read hides the sampler.

    Args:
        size: items of the data set.
        seed: of the order.
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
        return iter(self.indices())

    def indices(self) -> list[int]:
        """(len(self),) the order of this epoch."""
        order = random.Random(f"{self.seed} {self.epoch}").sample(range(self.size), self.size)
        return [*order, *range(self.size, len(self))]

    def batch(self, number: int, rows: int) -> list[int]:
        """The items of the data set in one batch of this epoch.

        Args:
            number: of the batch, from 0, counted over all processes, which take batches in turn.
            rows: of a batch.
        """
        return [index for index in self.indices()[number * rows : (number + 1) * rows] if index < self.size]


class Filled(Dataset):
    """A data set with any number of extra items that have no labels to learn.

    Args:
        data: items have `labels`.
    """

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.data):
            return self.data[index]
        item = self.data[0]
        return item | {"labels": torch.full_like(item["labels"], IGNORED)}
