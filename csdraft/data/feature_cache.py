"""A frozen target's hidden states on disk: heads are then trained without the target's forward.

Of every position the hidden states that a head reads are kept, and the one that the target's output layer reads, from
which the distributions to learn are made again. They are bfloat16, whose range is that of float32: some models have
hidden states beyond float16's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdraft.data.row_arrays import Column, RowArguments, RowArrays, lengths_of, write_rows
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

    @staticmethod
    def columns(description: Mapping[str, Any]) -> dict[str, Column]:
        return {FEATURES: Column(np.int16, len(description["taps"]) * description["width"])}  # bits of bfloat16

    @staticmethod
    def sizes_of(rows: Any) -> np.ndarray:
        """All positions: a head reads the prompt, too."""
        return lengths_of(rows)

    @staticmethod
    def advice(description: Mapping[str, Any], bytes_left: int) -> str:
        fitting = bytes_left // (2 * description["width"])
        return f"at most {max(fitting - 1, 0)} layers instead of {len(description['taps']) - 1}"

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
    """Writes the cache, or what is still missing of it; see `write_rows`.

    Args:
        load_target, rows, folder, part: see `write_rows`.
        name: of the target.
        layers: hidden states beside the last one; k is the one after k blocks.
        width: of the target's hidden states.
        batch_size: rows read at once.

    Raises:
        ValueError: as of `write_rows`.
    """
    taps = [*sorted(set(layers)), LAST]
    described = {"target": name, "taps": taps, "width": width}
    count = f"{len(taps)} x {width}"
    write_rows(
        FeatureCache, load_target, partial(_states, taps=taps), rows, folder, described, count, batch_size, part
    )


@torch.no_grad()
def _states(
    target: Any, texts: Sequence[Sequence[int]], sizes: np.ndarray, taps: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    """Of each text all hidden states that are kept, by file."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=target.device)
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(target.forward).parameters else {}
    states = target(input_ids=ids, use_cache=False, output_hidden_states=True, **few).hidden_states
    joined = torch.cat([states[tap].to("cpu", torch.bfloat16) for tap in taps], -1).view(torch.int16)
    return [{FEATURES: joined[row, :size].numpy()} for row, size in enumerate(sizes.tolist())]


@dataclass
class FeatureArguments(RowArguments):
    """Whose hidden states to keep, over which rows, and which."""

    layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Hidden states that the head reads, k for the one after k blocks; the last one is always kept. "
            "EAGLE-3 reads 2, L/2 and L - 3 of L blocks."
        },
    )


def cache_features(args: FeatureArguments) -> None:
    """`write_features` for the rows of a data set, as `read_rows` reads them for training.

    Raises:
        ValueError: before the target is loaded, for data that cannot be read, a target that is no decoder-only model,
            layers that it lacks, rows longer than its context, and what `write_features` refuses.
    """
    config, rows = args.read("features")
    text, name = config.get_text_config(decoder=True), target_name(args)
    if wrong := [layer for layer in args.layers if not 0 <= layer <= text.num_hidden_layers]:
        raise ValueError(f"layers={args.layers}: {wrong[0]} must be from 0 to {text.num_hidden_layers}, the target's")
    kept, width = args.layers, text.hidden_size
    write_features(args.load_target, rows, args.output_dir, name, kept, width, args.batch_size, args.part)
