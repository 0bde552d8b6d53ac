"""Medusa's original layout (arXiv 2401.10774), which TensorRT-LLM and TGI also read.

`config.json` has the number of heads, the number of blocks in each, and the target's name. `medusa_lm_head.pt` has the
blocks, `{head}.{block}.linear.weight` and `.bias`, and the output layers, `{head}.{blocks}.weight`; some files put
`medusa_head.` in front of each name. Only the tensors say the target's width and number of tokens. The layout has no
draft vocabulary: csdraft stores a head with one in its own layout, see `csdraft/heads/formats/own.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.folder import WEIGHTS, Names, read_layer
from csdraft.heads.formats import own
from csdraft.heads.kinds.medusa import Medusa, MedusaOptions
from csdraft.heads.self_draft import Lender
from csdraft.heads.stored_head import Parts, StoredHead
from csdraft.stored import fit

__all__ = ["MedusaHead"]

HEADS, BLOCKS, TARGET = "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"
PREFIX = "medusa_head."


class MedusaHead(StoredHead):
    """Medusa heads that draft all tokens, without their target."""

    what, complete = "Medusa head", Medusa
    file, files = "medusa_lm_head.pt", ("medusa_lm_head.safetensors", "medusa_lm_head.pt", *WEIGHTS)

    @classmethod
    def of(cls, head: Any, state_dict: Mapping[str, Tensor] | None = None) -> Any:
        if len(head.d2t) < head.config.vocab_size:
            return own.OwnHead.of(head, state_dict)
        return super().of(head, state_dict)

    @property
    def target_name(self) -> str | None:
        return super().target_name or getattr(self.config, TARGET, None)

    @property
    def title(self) -> str:
        return f"{self.options.steps} Medusa heads of {self.options.layers} blocks"

    def document(self) -> dict[str, Any]:
        sizes = {key: getattr(self.config, key) for key in ("hidden_size", "vocab_size")}
        return {HEADS: self.options.steps, BLOCKS: self.options.layers, TARGET: self.target_name, **sizes}

    def written(self) -> dict[str, Tensor]:
        return {name.removeprefix(PREFIX): tensor for name, tensor in super().written().items()}

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        """True also for a config without one of the keys, but not for a whole model that was saved with its heads."""
        return bool({HEADS, BLOCKS} & config.keys()) and "num_hidden_layers" not in config

    @classmethod
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        at = f"{path}/config.json"
        state = {f"{PREFIX}{name.removeprefix(PREFIX)}": tensor for name, tensor in state.items()}
        heads, blocks, assumed = _counts(config, state, at)
        output = state.get(f"{PREFIX}0.{blocks}.weight", torch.empty(0))
        if output.ndim != 2:
            raise ValueError(f"{path!r} lacks {PREFIX}0.{blocks}.weight, head 0's output layer after {blocks} blocks")
        vocab, width = output.shape
        name = fit(config.get(TARGET), str | None, f"{at}: {TARGET}")
        if name is None and base is None:
            assumed.append(f"{TARGET} is not set: any target of width {width} with {vocab} tokens is accepted")
        layer = read_layer({"vocab_size": vocab, "hidden_size": width, "num_attention_heads": 1, TARGET: name}, path)
        return layer, MedusaOptions(steps=heads, layers=blocks), state, assumed


def _counts(config: Mapping[str, Any], state: Mapping[str, Tensor], at: str) -> tuple[int, int, list[str]]:
    """The number of heads, the number of blocks in each, and what is assumed about them.

    Published files hold more heads than their config says: all are read.
    """
    named = [re.match(rf"{re.escape(PREFIX)}(\d+)\.(\d+)\.", name) for name in state]
    found = [(int(match[1]), int(match[2])) for match in named if match]
    last, deep = (max(numbers) for numbers in zip(*found, strict=True)) if found else (-1, 1)
    heads, blocks = (fit(config.get(key), int | None, f"{at}: {key}") for key in (HEADS, BLOCKS))
    assumed = []
    if heads is None or heads <= last:
        said, heads = "not set" if heads is None else heads, last + 1
        assumed.append(f"{HEADS} is {said}: all {heads} of the file are read")
    if blocks is None:
        assumed.append(f"{BLOCKS} is not set: {deep} is assumed")
        blocks = deep
    if not 0 < heads <= len(state) or not 0 <= blocks <= len(state):
        raise ValueError(
            f"{at}: {HEADS}={heads}, {BLOCKS}={blocks}, and there are {len(state)} tensors; each head has one or "
            "more, and each block two: get the files that belong together"
        )
    return heads, blocks, assumed
