"""Tokens that a model has chosen on its device and the host has not seen yet.

The target can read them where they are. The host sees them in the one copy that also brings the target's choices; who
looks at them before waits for a copy of its own, and sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor

__all__ = ["Awaited", "Choices"]


class Choices:
    """What the steps of a chain have chosen in a batch.

    Args:
        table: (steps, 2, batch) float64 on the device: each token, and its score.
    """

    def __init__(self, table: Tensor):
        self.table = table
        self.tokens = table[:, 0].long()  # (steps, batch)
        self._seen: list[list[list[float]]] | None = None

    @property
    def waiting(self) -> bool:
        """Whether the host has not seen them yet."""
        return self._seen is None

    def receive(self, values: Sequence[float]) -> None:
        """Takes the flat values of `table`, which came with another copy."""
        steps, columns, batch = self.table.shape
        numbers = iter(values)
        self._seen = [[[next(numbers) for _ in range(batch)] for _ in range(columns)] for _ in range(steps)]

    def column(self, place: int, steps: int) -> tuple[int, ...]:
        """The first tokens of one row of the batch, on the host."""
        if self._seen is None:
            self._seen = self.table.tolist()
        return tuple(int(step[0][place]) for step in self._seen[:steps])

    def has_nan(self, place: int) -> bool:
        """Whether a score of a row is nan: its model has failed."""
        self.column(place, 0)
        assert self._seen is not None
        return any(step[1][place] != step[1][place] for step in self._seen)


class Awaited(Sequence[int]):
    """One row's tokens of some `Choices`: a sequence of numbers that is fetched when it is looked into.

    Args:
        choices: of the batch.
        place: of the row in it.
        count: how many.
    """

    def __init__(self, choices: Choices, place: int, count: int):
        self.choices, self.place, self._count = choices, place, count

    @property
    def waiting(self) -> bool:
        """Whether the host has not seen them yet."""
        return self.choices.waiting

    @property
    def have_nan(self) -> bool:
        """Whether the model that chose them has failed; asked when the host has seen them."""
        return self.choices.has_nan(self.place)

    @property
    def on_device(self) -> Tensor:
        """(count,) int64 where the model chose them."""
        return self.choices.tokens[: self._count, self.place]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice) and not index.start and index.step is None and (index.stop or 0) >= 0:
            return Awaited(self.choices, self.place, range(self._count)[index].stop)  # not looked into yet
        return self.choices.column(self.place, self._count)[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.choices.column(self.place, self._count))

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
