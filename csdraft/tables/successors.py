"""A table of a model's likeliest successors of each token, given that token alone, and of how it continues from them.

The model-derived bigram of the N-Grammys (arXiv 2411.03786), with its extension to a few tokens.
`scripts/build_bigrams.py --model` builds it once for a target, in minutes, without any text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from csdraft.stored import naming
from csdraft.tables._file import read_arrays

__all__ = ["SuccessorTable"]

FORMAT = "csdraft-successors-1"


@dataclass(frozen=True, eq=False)
class SuccessorTable:
    """An immutable value that threads may share.

    Attributes:
        successors: (vocab, rows, length) int32; entry [t, i] is the i-th likeliest token after t, and then what the
            model writes greedily after both.
    """

    successors: np.ndarray

    def __post_init__(self) -> None:
        values = np.array(self.successors, dtype=np.int32)
        values.setflags(write=False)
        object.__setattr__(self, "successors", values)
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
            rows: how many likeliest successors to keep for each token.
            length: tokens of a continuation; each after the first costs `rows` sequences for each vocabulary token.
            prefix: tokens before each token, such as a begin-of-text token if the model always expects one.
            batch: sequences a forward.
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

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"successors": self.successors}, path, metadata={"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> SuccessorTable:
        """Reads what `save` wrote."""
        way_out = "build a table with scripts/build_bigrams.py --model"
        parts, _ = read_arrays(path, FORMAT, {"successors": ("I32", 3)}, way_out)
        with naming(path):
            return cls(**parts)


def _last_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(texts, vocab) logits after each text."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=False, **keep).logits[:, -1]
