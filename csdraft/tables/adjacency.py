"""The adjacency matrix of Token Recycling: the likeliest tokens after each token, as the target last scored them.

Token Recycling (arXiv 2408.08696): plain decoding throws these tokens away; here they are the drafts of later rounds.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from csdraft.tables._file import read_arrays

__all__ = ["AdjacencyTable"]

FORMAT = "csdraft-adjacency-1"
KEPT = 8
"""Successors kept a token, as in the paper."""
UNKNOWN = -1


class AdjacencyTable:
    """The last successors seen after each token, for one target. Threads may share it.

    Args:
        vocab: the target's number of tokens.

    Attributes:
        successors: (vocab + 1, KEPT) int32, best first; -1 where unknown. The last row stands for what follows an
            unknown token; it is all unknown.
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
        with _LOCK:
            if target not in _TABLES:
                _TABLES[target] = cls(vocab)
            return _TABLES[target]

    def claim(self, target: Any) -> None:
        """Makes this the target's table; ValueError if it already is another's, or has another vocabulary."""
        with self._lock:
            if self._target is None:
                self._target = weakref.ref(target)
            if self._target() is not target:
                raise ValueError(
                    "this adjacency table holds what another target finds likely; give each target its own, or none: "
                    "each target then has one of its own"
                )

    def copy(self) -> AdjacencyTable:
        """A table with the same successors that belongs to no target yet."""
        twin = AdjacencyTable(len(self))
        with self._lock:
            twin.successors[:] = self.successors
        return twin

    def update(self, tokens: np.ndarray, successors: np.ndarray) -> None:
        """Stores (n, KEPT) `successors` of (n,) `tokens`; if a token comes twice, the last entry counts."""
        with self._lock:
            self.successors[tokens] = successors

    def known(self, token: int) -> bool:
        """Whether anything was seen after `token`."""
        return self.successors[token, 0] != UNKNOWN

    def follow(self, tokens: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """(n,) the successor of each of (n,) `tokens` at its rank; -1 where unknown, and after a token -1."""
        return self._flat[tokens * KEPT + ranks]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            known = self.successors[:-1].copy()
        save_file({"successors": known}, path, metadata={"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> AdjacencyTable:
        """Reads what `save` wrote."""
        parts, _ = read_arrays(path, FORMAT, {"successors": ("I32", 2)}, "write one with AdjacencyTable.save")
        values = parts["successors"]
        if values.shape[1] != KEPT:
            raise ValueError(f"{path} holds successors of shape {values.shape}; they must be (vocab, {KEPT})")
        if not len(values):
            raise ValueError(f"{path} holds successors of no token")
        if not UNKNOWN <= values.min() <= values.max() < len(values):
            raise ValueError(
                f"{path} holds successors from {values.min()} to {values.max()}, of a vocabulary of {len(values)}"
            )
        if ((values == UNKNOWN).any(1) != (values == UNKNOWN).all(1)).any():
            raise ValueError(f"{path} knows some successors of a token and not all {KEPT} of them")
        table = cls(len(values))
        table.successors[:-1] = values
        return table


_TABLES: weakref.WeakKeyDictionary[Any, AdjacencyTable] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
