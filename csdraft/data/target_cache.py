"""A frozen target's largest logits on disk, so that training needs no forward of the target.

Each position keeps its k most probable tokens: log-probabilities in float16, ids in int32, and the logsumexp of all
logits in float32. The logsumexp gives back the logits themselves and the probability that all other tokens share.
Log-probabilities rather than logits, because float16 is most precise near 0, where the likely tokens are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csdraft.data.row_arrays import RowArguments, RowArrays, lengths_of, prompt_lengths_of, write_rows
from csdraft.data.shards import Part
from csdraft.data.target import option, target_name

__all__ = ["CacheArguments", "TargetCache", "TopK", "cache_logits", "dense", "write_target_cache"]

LOG_PROBS, IDS, LOGSUMEXP = "log_probs.f16", "ids.i32", "logsumexp.f32"


class TopK(NamedTuple):
    """The most probable next tokens after each token of a row, most probable first; nan where nothing is scored.

    Attributes:
        log_probs: (length, k) float32, at temperature 1; rounded to float16.
        ids: (length, k) int64.
        logsumexp: (length,) float32, of all logits; `log_probs + logsumexp[:, None]` are the logits.
    """

    log_probs: Tensor
    ids: Tensor
    logsumexp: Tensor

    @property
    def rest(self) -> Tensor:
        """(length,) float32, probability of all tokens that are not listed."""
        return (1 - self.log_probs.exp().sum(-1)).clamp(min=0)

    def packed(self) -> Tensor:
        """(length, 2 k) int32 log-probabilities (their bits) and ids, for `dense`: engines would round floats."""
        return torch.cat([self.log_probs.view(torch.int32), self.ids.int()], -1)


def dense(packed: Tensor, vocab: int) -> Tensor:
    """Logits over all tokens; the tokens that are not listed share the rest of the probability evenly.

    Args:
        packed: (positions, 2 k) from `TopK.packed`.
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
    """Reads what `write_target_cache` wrote; `cache[row]` is a `TopK`. See `RowArrays`."""

    what = "logits"
    document = "target_cache.json"
    smaller = "a smaller k"

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, np.dtype]:
        k = description["k"]
        types = {LOG_PROBS: (np.float16, (k,)), IDS: (np.int32, (k,)), LOGSUMEXP: np.float32}
        return {name: np.dtype(of) for name, of in types.items()}

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """The predictions that training scores: none within the prompt, and none after the last token."""
        return np.maximum(lengths_of(rows) - np.maximum(prompt_lengths_of(rows), 1), 0)

    @staticmethod
    def compute(
        target: Any, ids: Tensor, lengths: np.ndarray, sizes: np.ndarray, description: Mapping[str, Any]
    ) -> list[dict[str, Tensor]]:
        k = description["k"]
        logits = target(input_ids=ids, use_cache=False).logits  # padding follows the texts, which do not see it
        if k > logits.shape[-1]:
            raise ValueError(f"k={k} is more than the target's {logits.shape[-1]} tokens; give fewer")
        found = []
        for row, (length, size) in enumerate(zip(lengths.tolist(), sizes.tolist(), strict=True)):
            scored = logits[row, length - 1 - size : length - 1].float()  # (size, vocab)
            logsumexp = scored.logsumexp(-1)  # (size,)
            values, top = scored.topk(k, -1)  # (size, k) each
            found.append({LOG_PROBS: values - logsumexp[:, None], IDS: top, LOGSUMEXP: logsumexp})
        return found

    def __getitem__(self, row: int) -> TopK:
        size = self.ends[row + 1] - self.ends[row]
        length, k = self.lengths[row], self.description["k"]
        top = TopK(
            log_probs=torch.full((length, k), torch.nan),
            ids=torch.zeros(length, k, dtype=torch.long),
            logsumexp=torch.full((length,), torch.nan),
        )
        for whole, name in zip(top, (LOG_PROBS, IDS, LOGSUMEXP), strict=True):
            whole[length - 1 - size : -1] = torch.from_numpy(self.read(name, row))
        return top

    def packed(self, row: int) -> Tensor:
        return self[row].packed()


def write_target_cache(
    load_target: Callable[[], Any],
    rows: Any,
    folder: str | os.PathLike[str],
    name: str,
    k: int = 64,
    batch_size: int = 8,
    part: Part | None = None,
) -> None:
    """Writes the cache, or what is still missing in it.

    Args:
        load_target, rows, folder, part: see `write_rows`.
        name: of the target.
        k: tokens kept at each position.
        batch_size: rows read at once; their logits, (batch_size, longest row, vocab), must fit into memory.

    Raises:
        ValueError: as `write_rows`; or k is below 1, or no position is scored.
    """
    positions = TargetCache.sizes_of(rows).sum()
    if k < 1 or not positions:
        raise ValueError(f"k={k} tokens of {positions} scored positions are nothing to keep; give 1 or more of both")
    write_rows(TargetCache, load_target, rows, folder, {"target": name, "k": k}, batch_size, part)


@dataclass
class CacheArguments(RowArguments):
    """Which target's logits to keep, over which rows, and how many."""

    k: int = option(64, "Logits kept at each position.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "k")


def cache_logits(args: CacheArguments) -> None:
    """`write_target_cache` for the rows of a data set, as training reads them.

    Raises:
        ValueError: as `RowArguments.read` and `write_target_cache`, before the target is loaded.
    """
    _, rows = args.read("logits")
    name = target_name(args)
    write_target_cache(args.load_target, rows, args.output_dir, name, args.k, args.batch_size, args.part)
