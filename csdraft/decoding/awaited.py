"""Tokens that a model has chosen on its device and that have not been copied to the host yet.

The target can read them on the device. They reach the host in the same copy as the target's choices. Code that looks
at them earlier waits for an extra copy, and gets the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from torch import Tensor

__all__ = ["Awaited", "Choices"]


class Choices:
    """The tokens that the steps of a chain have chosen, for a batch.

    Args:
        table: (steps, 2, batch) float64 on the device: each token and its score.
    """

    def __init__(self, table: Tensor):
        self.table = table
        self.tokens = table[:, 0].long()  # (steps, batch)
        self._seen: np.ndarray | None = None

    @property
    def waiting(self) -> bool:
        """Whether they have not been copied to the host yet."""
        return self._seen is None

    def receive(self, values: Sequence[float]) -> None:
        """Stores the flat values of `table`, which came to the host with another copy."""
        self._seen = np.reshape(values, self.table.shape)

    @property
    def seen(self) -> np.ndarray:
        """`table` on the host."""
        if self._seen is None:
            self._seen = self.table.cpu().numpy()
        return self._seen


class Awaited(Sequence[int]):
    """One row's tokens from `Choices`: a sequence of token ids that is copied to the host when it is first read.

    Args:
        choices: the choices of the batch.
        place: the row's index in the batch.
        count: number of tokens.
    """

    def __init__(self, choices: Choices, place: int, count: int):
        self.choices, self.place, self._count = choices, place, count

    @property
    def waiting(self) -> bool:
        """Whether they have not been copied to the host yet."""
        return self.choices.waiting

    @property
    def have_nan(self) -> bool:
        """Whether the model that chose them has failed; call it when they are on the host."""
        return bool(np.isnan(self.choices.seen[:, 1, self.place]).any())

    @property
    def on_device(self) -> Tensor:
        """(count,) int64 on the model's device."""
        return self.choices.tokens[: self._count, self.place]

    def is_row_of(self, other: Awaited, place: int) -> bool:
        """Whether it belongs to the same chain as `other`, has the same length, and is row `place` of the batch."""
        return (self.choices, self.place, self._count) == (other.choices, place, other._count)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice) and not index.start and index.step is None and (index.stop or 0) >= 0:
            return Awaited(self.choices, self.place, range(self._count)[index].stop)  # still needs no copy
        return tuple(self)[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.choices.seen[: self._count, 0, self.place].astype(int).tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != self._count:
            return False
        return not self._count or tuple(self) == tuple(other)

    def __add__(self, other: Sequence[int]) -> tuple[int, ...]:
        return (*self, *other)

    def __radd__(self, other: Sequence[int]) -> tuple[int, ...]:
        return (*other, *self)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Awaited({'...' if self.waiting else list(self)})"
