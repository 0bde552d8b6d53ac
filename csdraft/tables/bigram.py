"""A bigram table: the token that most often follows each token in a text that the user gives.

The fallback of Max-Gram in Cascade Speculative Drafting (arXiv 2312.11462, appendix A). `scripts/build_bigrams.py`
builds one for any tokenizer. A token that no other token follows in the text has no successor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from csdraft.tables._file import ArrayTable

__all__ = ["BigramTable"]

UNKNOWN = -1
CHUNK = 1 << 22
"""Tokens that are counted at a time, to save memory."""


@dataclass(frozen=True, eq=False)
class BigramTable(ArrayTable):
    """The most frequent successor of each token.

    Attributes:
        successor: (vocab,) int32 most frequent next token, the lowest id in a tie; -1 where unknown.
        count: (vocab,) int64 how often that pair occurred.
    """

    format: ClassVar = "csdraft-bigram-1"
    stored: ClassVar = {"successor": ("I32", 1), "count": ("I64", 1)}
    way_out: ClassVar = "build a table with scripts/build_bigrams.py"

    successor: np.ndarray
    count: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        vocab = len(self.successor)
        if self.successor.ndim != 1 or self.count.shape != self.successor.shape:
            raise ValueError(
                f"successor has shape {self.successor.shape}, count {self.count.shape}; both must be (vocab,)"
            )
        if vocab and (self.successor.min() < UNKNOWN or self.successor.max() >= vocab):
            raise ValueError(f"successors must be {UNKNOWN} (unknown) or ids below {vocab}, the table's own length")

    def __len__(self) -> int:
        """Vocabulary size."""
        return len(self.successor)

    @cached_property
    def _view(self) -> memoryview:
        """The successors as plain integers: indexing is twice as fast as numpy's."""
        return self.successor.data

    def after(self, token: int, depth: int) -> list[int]:
        """At most `depth` tokens, each the likeliest after the one before; fewer where nothing is known."""
        view, tokens = self._view, []
        while len(tokens) < depth and token < len(view) and (token := view[token]) != UNKNOWN:
            tokens.append(token)
        return tokens

    @classmethod
    def build(cls, documents: Iterable[Sequence[int]], vocab: int) -> BigramTable:
        """Counts the pairs of neighbouring tokens inside each document; no pair spans two documents."""
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        waiting: list[np.ndarray] = []
        size = 0
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)  # (tokens,)
            if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
                raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab}")
            waiting.append(ids[:-1] * vocab + ids[1:])
            size += len(ids)
            if size > CHUNK:
                pairs, counts = _merge(pairs, counts, waiting)
                waiting, size = [], 0
        pairs, counts = _merge(pairs, counts, waiting)
        successor, count = np.full(vocab, UNKNOWN, np.int32), np.zeros(vocab, np.int64)
        order = np.lexsort((-pairs, counts))  # rising counts; in a tie the lowest id is written last, and stays
        successor[pairs[order] // vocab] = pairs[order] % vocab
        count[pairs[order] // vocab] = counts[order]
        return cls(successor, count)


def _merge(pairs: np.ndarray, counts: np.ndarray, waiting: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct pairs and their counts, with the pairs of `waiting` added."""
    fresh, seen = np.unique(np.concatenate([np.empty(0, np.int64), *waiting]), return_counts=True)
    distinct, where = np.unique(np.concatenate([pairs, fresh]), return_inverse=True)
    total = np.zeros(len(distinct), np.int64)  # (distinct pairs,)
    np.add.at(total, where, np.concatenate([counts, seen]))
    return distinct, total
