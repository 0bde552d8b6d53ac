"""A frozen target's largest logits, or its hidden states, on disk, so that training needs no forward of the target.

Of logits, each position keeps the k most probable tokens: log-probabilities in float16, ids in int32. (float16 is most
precise near 0, where the log-probabilities of likely tokens are.)

Of hidden states, each position keeps those that a head reads, and the one that the target's output layer reads: it
gives back the distributions to learn. They are stored as bfloat16, which has float32's range: some models' hidden
states are too large for float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from csdraft.data.row_arrays import RowArguments, RowArrays, lengths_of, prompt_lengths_of
from csdraft.data.target import check_at_least, option, target_name

__all__ = [
    "LAST", "CacheArguments", "FeatureArguments", "FeatureCache", "TargetCache", "cache_features", "cache_logits",
    "dense",
]  # fmt: skip

LOG_PROBS, IDS, FEATURES = "log_probs.f16", "ids.i32", "features.bf16"
LAST = -1
"""The hidden state that the output layer reads; see `csdraft.heads.head`."""


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
    """The largest logits of each position. The description's `k` is the number of tokens kept at each position."""

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


@dataclass(frozen=True)
class FeatureCache(RowArrays):
    """Hidden states by row. The description has the `taps` that are kept and the `width` of each."""

    what = "features"
    document = "features.json"
    smaller = "fewer layers"

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, np.dtype]:
        width = len(description["taps"]) * description["width"]
        return {FEATURES: np.dtype((np.int16, (width,)))}  # numpy has no bfloat16: these are its bits

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """All positions: a head reads the prompt, too."""
        return lengths_of(rows)

    @staticmethod
    def compute(
        target: Any, ids: Tensor, lengths: np.ndarray, sizes: np.ndarray, description: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        few = {"logits_to_keep": 1} if "logits_to_keep" in signature(target.forward).parameters else {}
        states = target(input_ids=ids, use_cache=False, output_hidden_states=True, **few).hidden_states
        kept = [states[tap].to("cpu", torch.bfloat16) for tap in description["taps"]]
        joined = torch.cat(kept, -1).view(torch.int16)  # (rows, longest, taps x width)
        return ({FEATURES: joined[row, :size]} for row, size in enumerate(sizes.tolist()))

    @property
    def taps(self) -> tuple[int, ...]:
        """Which hidden states are kept, in the order of `packed`."""
        return tuple(self.description["taps"])

    def packed(self, row: int) -> Tensor:
        """(length, taps x width) bfloat16 hidden states of each position, side by side."""
        return torch.from_numpy(self.read(FEATURES, row)).view(torch.bfloat16)


@dataclass
class FeatureArguments(RowArguments):
    """Which target's hidden states to keep, over which rows, and which of them."""

    layers: list[int] = option(
        [],
        "Hidden states that the head reads, k for the one after k blocks; the last one is always kept. EAGLE-3 reads "
        "2, L/2 and L - 3 of L blocks.",
    )


def cache_features(args: FeatureArguments) -> None:
    """Writes the cache of a data set's rows, as training reads them, or what is still missing in it.

    Raises:
        ValueError: as `RowArguments.read` and `RowArrays.write`, or for layers that the target lacks; before the
            target is loaded.
    """
    config, rows = args.read("features")
    text = config.get_text_config(decoder=True)
    if wrong := [layer for layer in args.layers if not 0 <= layer <= text.num_hidden_layers]:
        raise ValueError(f"layers={args.layers}: {wrong[0]} must be from 0 to {text.num_hidden_layers}, the target's")
    description = {"target": target_name(args), "taps": [*sorted({*args.layers}), LAST], "width": text.hidden_size}
    FeatureCache.write(args.load_target, rows, args.output_dir, description, args.batch_size, args.part)
