"""A table of a model's likeliest successors of each token, given that token alone, and of how it continues from them.

The model-derived bigram of the N-Grammys (arXiv 2411.03786), with its extension to a few tokens.
`scripts/build_bigrams.py --model` builds it once for a target, in minutes, without any text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from csdraft.tables._file import ArrayTable

__all__ = ["SuccessorTable"]


@dataclass(frozen=True, eq=False)
class SuccessorTable(ArrayTable):
    """The likeliest continuations of each token.

    Attributes:
        successors: (vocab, rows, length) int32; entry [t, i] begins with the i-th likeliest token after t, and
            continues with what the model writes greedily after both.
    """

    format: ClassVar = "csdraft-successors-1"
    stored: ClassVar = {"successors": ("I32", 3)}
    way_out: ClassVar = "build a table with scripts/build_bigrams.py --model"

    successors: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.successors
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(f"successors have shape {values.shape}; it must be (vocab, rows, length), none of them 0")
        if values.min() < 0 or values.max() >= len(values):
            raise ValueError(
                f"successors go from {values.min()} to {values.max()}; they must be ids below {len(values)}"
            )

    def __len__(self) -> int:
        """Vocabulary size."""
        return len(self.successors)

    @cached_property
    def _best(self) -> memoryview:
        """(vocab,) each token's likeliest successor, as plain integers."""
        return np.ascontiguousarray(self.successors[:, 0, 0]).data

    def after(self, token: int, rows: int, depth: int) -> list[list[int]]:
        """At most `rows` continuations of `token`, the likeliest first, each of `depth` tokens.

        Past the table's length, a row continues with the likeliest successor of its last token.
        """
        found, best = self.successors[token, :rows, :depth].tolist(), self._best
        for row in found:
            while len(row) < depth:
                row.append(best[row[-1]])
        return found

    @classmethod
    @torch.no_grad()
    def build(
        cls, model: nn.Module, rows: int = 10, length: int = 3, prefix: Sequence[int] = (), batch: int = 1024
    ) -> SuccessorTable:
        """Runs a causal LM on every token of its vocabulary.

        Args:
            rows: likeliest successors to keep for each token.
            length: tokens of a continuation. Each after the first costs `rows` sequences for each vocabulary token.
            prefix: tokens before each token, such as a begin-of-text token if the model always expects one.
            batch: sequences per forward.
        """
        vocab = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
        device = next(model.parameters()).device
        found = np.empty((vocab, rows, length), np.int32)
        for start in range(0, vocab, batch):
            ids = torch.arange(start, min(start + batch, vocab), device=device)[:, None]  # (tokens, 1)
            texts = torch.cat([torch.tensor(prefix, dtype=torch.long, device=device).expand(len(ids), -1), ids], 1)
            best = _last_logits(model, texts).topk(rows, -1).indices  # (tokens, rows)
            texts = torch.cat([texts.repeat_interleave(rows, 0), best.reshape(-1, 1)], 1)  # (tokens * rows, length)
            for _ in range(length - 1):
                parts = [_last_logits(model, part).argmax(-1) for part in texts.split(batch)]
                texts = torch.cat([texts, torch.cat(parts)[:, None]], 1)
            found[start : start + batch] = texts[:, -length:].reshape(len(ids), rows, length).cpu()
        return cls(found)


def _last_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(texts, vocab) logits after each text."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=False, **keep).logits[:, -1]
