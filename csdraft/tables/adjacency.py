"""The adjacency matrix of Token Recycling (arXiv 2408.08696): the likeliest tokens after each token.

Plain decoding throws these tokens away; here they become the drafts of later rounds.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from csdraft.tables._file import read_arrays, write_arrays
from csdraft.tables._kept import kept_for

__all__ = ["AdjacencyTable"]

FORMAT = "csdraft-adjacency-1"
KEPT = 8
"""Successors kept per token, as in the paper."""
UNKNOWN = -1


class AdjacencyTable:
    """The likeliest successors of each token, as one target last scored them. Threads may share it.

    Args:
        vocab: the target's number of tokens.

    Attributes:
        successors: (vocab + 1, KEPT) int32, best first; -1 where unknown. The last row, for an unknown token, is -1.
    """

    def __init__(self, vocab: int):
        self.successors = np.full((vocab + 1, KEPT), UNKNOWN, np.int32)
        self._flat = self.successors.reshape(-1)
        self._lock = threading.Lock()
        self._target: weakref.ref | None = None

    def __len__(self) -> int:
        """Vocabulary size."""
        return len(self.successors) - 1

    @classmethod
    def of(cls, target: Any, vocab: int) -> AdjacencyTable:
        """The table that this process keeps for a target, until the target is gone."""
        return kept_for(target, cls, lambda: cls(vocab))

    def claim(self, target: Any) -> None:
        """Makes this the target's table; raises ValueError if it already is another target's."""
        with self._lock:
            if self._target is None:
                self._target = weakref.ref(target)
            if self._target() is not target:
                raise ValueError(
                    "this adjacency table was learned from another target; give each target its own table, or none: "
                    "then one is made for each"
                )

    def copy(self) -> AdjacencyTable:
        """A table with the same successors that belongs to no target yet."""
        copied = AdjacencyTable(len(self))
        with self._lock:
            copied.successors[:] = self.successors
        return copied

    def update(self, tokens: np.ndarray, successors: np.ndarray) -> None:
        """Stores the (n, KEPT) `successors` of (n,) `tokens`; if a token occurs twice, its last entry counts."""
        with self._lock:
            self.successors[tokens] = successors

    def known(self, token: int) -> bool:
        """Whether anything was seen after `token`."""
        return self.successors[token, 0] != UNKNOWN

    def follow(self, tokens: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """(n,) the successor of each of (n,) `tokens` at its rank in (n,) `ranks`; -1 where unknown."""
        return self._flat[tokens * KEPT + ranks]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        write_arrays(path, FORMAT, {"successors": self.copy().successors[:-1]})

    @classmethod
    def load(cls, path: str | Path) -> AdjacencyTable:
        """Reads what `save` wrote."""
        parts, _ = read_arrays(path, FORMAT, {"successors": ("I32", 2)}, "write one with AdjacencyTable.save")
        values = parts["successors"]
        if values.shape[1] != KEPT or not len(values):
            raise ValueError(f"{path} holds successors of shape {values.shape}; it must be (vocab, {KEPT}), vocab > 0")
        if not UNKNOWN <= values.min() <= values.max() < len(values):
            raise ValueError(
                f"{path} holds successors from {values.min()} to {values.max()}, of a vocabulary of {len(values)}"
            )
        if ((values == UNKNOWN).any(1) != (values == UNKNOWN).all(1)).any():
            raise ValueError(f"{path} has a token with some successors but not all {KEPT}")
        table = cls(len(values))
        table.successors[:-1] = values
        return table
