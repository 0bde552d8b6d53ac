"""A frozen target's largest logits on disk, so that training needs no forward of the target.

Each position keeps its k most probable tokens: log-probabilities in float16, ids in int32. Log-probabilities rather
than logits, because float16 is most precise near 0, where the likely tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from csdraft.data.row_arrays import RowArguments, RowArrays, lengths_of, prompt_lengths_of
from csdraft.data.target import check_at_least, option, target_name

__all__ = ["CacheArguments", "TargetCache", "cache_logits", "dense"]

LOG_PROBS, IDS = "log_probs.f16", "ids.i32"


def dense(packed: Tensor, vocab: int) -> Tensor:
    """Logits over all tokens; the tokens that are not listed share the rest of the probability evenly.

    Args:
        packed: (positions, 2 k) from `TargetCache.packed`.
        vocab: number of tokens.

    Returns:
        (positions, vocab) float32, normalised.
    """
    bits, ids = packed.chunk(2, -1)  # (positions, k) each
    log_probs = bits.view(torch.float32)
    others = max(vocab - ids.shape[-1], 1)
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)  # (positions, 1)
    filled = (rest.log() - np.log(others)).expand(-1, vocab)  # (positions, vocab)
    return filled.scatter(-1, ids.long(), log_probs).log_softmax(-1)


@dataclass(frozen=True)
class TargetCache(RowArrays):
    """Logits by row. The description's `k` is the number of tokens kept at each position."""

    what = "logits"
    document = "target_cache.json"
    smaller = "a smaller k"

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, np.dtype]:
        k = description["k"]
        return {LOG_PROBS: np.dtype((np.float16, (k,))), IDS: np.dtype((np.int32, (k,)))}

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """The predictions that training scores: none within the prompt, and none after the last token."""
        return np.maximum(lengths_of(rows) - np.maximum(prompt_lengths_of(rows), 1), 0)

    @staticmethod
    def compute(
        target: Any, ids: Tensor, lengths: np.ndarray, sizes: np.ndarray, description: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        logits = target(input_ids=ids, use_cache=False).logits  # padding follows the texts, which do not see it
        if (k := description["k"]) > logits.shape[-1]:
            raise ValueError(f"k={k} is more than the target's {logits.shape[-1]} tokens; give fewer")
        for row, (length, size) in enumerate(zip(lengths.tolist(), sizes.tolist(), strict=True)):
            scored = logits[row, length - 1 - size : length - 1].float()  # (size, vocab)
            values, top = scored.topk(k, -1)  # (size, k) each
            yield {LOG_PROBS: values - scored.logsumexp(-1, keepdim=True), IDS: top}

    def packed(self, row: int) -> Tensor:
        """(length, 2 k) int32 log-probabilities (their bits) and ids, for `dense`: engines would round floats.

        Most probable first; nan where nothing is scored.
        """
        around = (0, 0, self.lengths[row] - 1 - self.size(row), 1)  # positions before and after those that are kept
        log_probs, ids = (torch.from_numpy(self.read(name, row)) for name in (LOG_PROBS, IDS))
        log_probs = pad(log_probs.float(), around, value=torch.nan)
        return torch.cat([log_probs.view(torch.int32), pad(ids, around)], -1)


@dataclass
class CacheArguments(RowArguments):
    """Which target's logits to keep, over which rows, and how many."""

    k: int = option(64, "Logits kept at each position.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "k")


def cache_logits(args: CacheArguments) -> None:
    """Writes the cache of a data set's rows, as training reads them, or what is still missing in it.

    Raises:
        ValueError: as `RowArguments.read` and `RowArrays.write`, before the target is loaded.
    """
    _, rows = args.read("logits")
    description = {"target": target_name(args), "k": args.k}
    TargetCache.write(args.load_target, rows, args.output_dir, description, args.batch_size, args.part)
