"""A frozen target's hidden states on disk, so that heads train without the target's forward.

Each position keeps the hidden states that a head reads, and the one that the target's output layer reads: it gives
back the distributions to learn. They are stored as bfloat16, which has float32's range: some models' hidden states
are too large for float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdraft.data.row_arrays import RowArguments, RowArrays, lengths_of
from csdraft.data.target import target_name

__all__ = ["LAST", "FeatureArguments", "FeatureCache", "cache_features"]

FEATURES = "features.bf16"
LAST = -1
"""The hidden state that the output layer reads; see `csdraft.heads.head`."""


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

    layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Hidden states that the head reads, k for the one after k blocks; the last one is always kept. "
            "EAGLE-3 reads 2, L/2 and L - 3 of L blocks."
        },
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
