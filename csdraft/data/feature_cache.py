"""A frozen target's hidden states on disk, so that heads train without the target's forward.

Each position keeps the hidden states that a head reads, and the one that the target's output layer reads: it gives
back the distributions to learn. They are stored as bfloat16, which has float32's range: some models' hidden states
are too large for float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdraft.data.row_arrays import RowArguments, RowArrays, lengths_of, write_rows
from csdraft.data.shards import Part
from csdraft.data.target import target_name

__all__ = ["LAST", "FeatureArguments", "FeatureCache", "cache_features", "write_features"]

FEATURES = "features.bf16"
LAST = -1
"""The hidden state that the output layer reads; see `csdraft.heads.head`."""


@dataclass(frozen=True)
class FeatureCache(RowArrays):
    """Reads what `write_features` wrote. See `RowArrays`."""

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
    ) -> list[dict[str, Tensor]]:
        few = {"logits_to_keep": 1} if "logits_to_keep" in signature(target.forward).parameters else {}
        states = target(input_ids=ids, use_cache=False, output_hidden_states=True, **few).hidden_states
        kept = [states[tap].to("cpu", torch.bfloat16) for tap in description["taps"]]
        joined = torch.cat(kept, -1).view(torch.int16)  # (rows, longest, taps x width)
        return [{FEATURES: joined[row, :size]} for row, size in enumerate(sizes.tolist())]

    @property
    def taps(self) -> tuple[int, ...]:
        """Which hidden states are kept, in the order of `packed`."""
        return tuple(self.description["taps"])

    def packed(self, row: int) -> Tensor:
        """(length, taps x width) bfloat16 hidden states of each position, side by side."""
        return torch.from_numpy(self.read(FEATURES, row)).view(torch.bfloat16)


def write_features(
    load_target: Callable[[], Any],
    rows: Any,
    folder: str | os.PathLike[str],
    name: str,
    layers: Sequence[int],
    width: int,
    batch_size: int = 8,
    part: Part | None = None,
) -> None:
    """Writes the cache, or what is still missing in it.

    Args:
        load_target, rows, folder, batch_size, part: see `write_rows`.
        name: of the target.
        layers: hidden states to keep besides the last one; k is the one after k blocks.
        width: of the target's hidden states.

    Raises:
        ValueError: as `write_rows`.
    """
    description = {"target": name, "taps": [*sorted(set(layers)), LAST], "width": width}
    write_rows(FeatureCache, load_target, rows, folder, description, batch_size, part)


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
    """`write_features` for the rows of a data set, as training reads them.

    Raises:
        ValueError: as `RowArguments.read` and `write_features`, or for layers that the target lacks; before the target
            is loaded.
    """
    config, rows = args.read("features")
    text, name = config.get_text_config(decoder=True), target_name(args)
    if wrong := [layer for layer in args.layers if not 0 <= layer <= text.num_hidden_layers]:
        raise ValueError(f"layers={args.layers}: {wrong[0]} must be from 0 to {text.num_hidden_layers}, the target's")
    kept, width = args.layers, text.hidden_size
    write_features(args.load_target, rows, args.output_dir, name, kept, width, args.batch_size, args.part)
