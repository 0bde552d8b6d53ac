"""A frozen target's largest logits on disk, computed once and read many times: training without the target's forward.

Of each position the k most probable tokens are kept, as log-probabilities in float16, ids in int32, and the logsumexp
of all logits in float32: with it the logits themselves are known again, and how much probability the others share.
Log-probabilities rather than logits, because float16 is finest near 0, where the tokens are that matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csdraft.data.row_arrays import Column, RowArguments, RowArrays, columns_of, lengths_of, write_rows
from csdraft.data.shards import Part
from csdraft.data.target import target_name

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
        """(length, 2 k) float32, log-probabilities and then ids, for `dense`."""
        return torch.cat([self.log_probs, self.ids.float()], -1)


def dense(packed: Tensor, vocab: int) -> Tensor:
    """Logits over all tokens, with what the listed ones leave spread evenly over the others.

    Args:
        packed: (positions, 2 k) from `TopK.packed`.
        vocab: tokens, fewer than 2**24, up to which float32 holds every id.

    Returns:
        (positions, vocab) float32, normalised.
    """
    log_probs, ids = packed.float().chunk(2, -1)
    others = max(vocab - ids.shape[-1], 1)
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    filled = (rest.log() - np.log(others)).expand(-1, vocab)
    return filled.scatter(-1, ids.long(), log_probs).log_softmax(-1)


@dataclass(frozen=True)
class TargetCache(RowArrays):
    """Reads what `write_target_cache` wrote; `cache[row]` is a `TopK`. See `RowArrays`."""

    what = "logits"
    document = "target_cache.json"

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, Column]:
        k = description["k"]
        return {LOG_PROBS: Column(np.float16, k), IDS: Column(np.int32, k), LOGSUMEXP: Column(np.float32, 0)}

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """Predictions that count: all but those within the prompt, and of nothing after the last token."""
        prompts = np.array([row.get("prompt_length", 0) for row in columns_of(rows, "prompt_length")])
        return np.maximum(lengths_of(rows) - np.maximum(prompts, 1), 0)

    @staticmethod
    def advice(description: Mapping[str, Any], bytes_left: int) -> str:
        return f"a k of at most {max((bytes_left - 4) // 6, 0)} instead of {description['k']}"

    def __getitem__(self, row: int) -> TopK:
        start, stop = self.ends[row : row + 2]
        length, k = self.lengths[row], self.description["k"]
        first = length - (stop - start) - 1
        log_probs = torch.full((length, k), torch.nan)
        ids = torch.zeros(length, k, dtype=torch.long)
        logsumexp = torch.full((length,), torch.nan)
        for whole, stored in ((log_probs, LOG_PROBS), (ids, IDS), (logsumexp, LOGSUMEXP)):
            whole[first:-1] = torch.from_numpy(self.read(stored, row))
        return TopK(log_probs, ids, logsumexp)

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
    """Writes the cache, or what is still missing of it; see `write_rows`.

    Args:
        load_target, rows, folder, part: see `write_rows`.
        name: of the target.
        k: tokens kept of each position.
        batch_size: rows read at once; their logits, (batch_size, longest row, vocab), must fit into memory.

    Raises:
        ValueError: as of `write_rows`, or k is not a number of tokens.
    """
    positions = TargetCache.sizes_of(rows).sum()
    if k < 1 or not positions:
        raise ValueError(f"k={k} tokens of {positions} scored positions are nothing to keep; give 1 or more of both")
    described = {"target": name, "k": k}
    write_rows(TargetCache, load_target, partial(_largest, k=k), rows, folder, described, str(k), batch_size, part)


@dataclass
class CacheArguments(RowArguments):
    """Whose logits to keep, over which rows, and how many."""

    k: int = field(default=64, metadata={"help": "Logits kept of each position."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "k")


def cache_logits(args: CacheArguments) -> None:
    """`write_target_cache` for the rows of a data set, as `read_rows` reads them for training.

    Raises:
        ValueError: before the target is loaded, for data that cannot be read, a target that is no decoder-only model,
            rows longer than its context, and what `write_target_cache` refuses.
    """
    _, rows = args.read("logits")
    name = target_name(args)
    write_target_cache(args.load_target, rows, args.output_dir, name, args.k, args.batch_size, args.part)


@torch.no_grad()
def _largest(target: Any, texts: Sequence[Sequence[int]], sizes: np.ndarray, k: int) -> list[dict[str, np.ndarray]]:
    """Of each text's last `sizes` predictions: what is stored, by file."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=target.device)
    logits = target(input_ids=ids, use_cache=False).logits  # filling follows the texts, which do not see it
    if k > logits.shape[-1]:
        raise ValueError(f"k={k} tokens cannot be kept of {logits.shape[-1]}; give fewer")
    found = []
    for row, (text, size) in enumerate(zip(texts, sizes.tolist(), strict=True)):
        scored = logits[row, len(text) - 1 - size : len(text) - 1].float()
        logsumexp = scored.logsumexp(-1)
        values, places = scored.topk(k, -1)
        stored = {LOG_PROBS: values - logsumexp[:, None], IDS: places, LOGSUMEXP: logsumexp}
        found.append({name: value.cpu().numpy() for name, value in stored.items()})
    return found
