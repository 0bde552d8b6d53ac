"""Medusa heads on disk: the layout of the original code (arXiv 2401.10774), which TensorRT-LLM and TGI read, too.

`config.json` has the number of heads, that of blocks in each, and the target's name. `medusa_lm_head.pt` has tensors
`{head}.{block}.linear.weight` and `.bias`, and the output layers, `{head}.{blocks}.weight`; some files have
`medusa_head.` in front of each. How wide the target is, and how many tokens it has, only the tensors say. The layout
knows no draft vocabulary: a head with one is stored in csdraft's own, see `csdraft/heads/own_files.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csdraft.amounts import count_text
from csdraft.heads import own_files
from csdraft.heads.engines import ENGINES
from csdraft.heads.folder import WEIGHTS, Names, check_tensors, read_layer, read_tensors
from csdraft.heads.medusa import Medusa, MedusaOptions
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit

__all__ = ["MedusaHead"]

HEADS, BLOCKS, TARGET = "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"
FILE, PREFIX = "medusa_lm_head.pt", "medusa_head."
FILES = (f"{Path(FILE).stem}.safetensors", FILE, *WEIGHTS)


class MedusaHead(StoredHead):
    """Medusa heads that draft all tokens, without their target."""

    what = "Medusa head"

    def network(self, target: Any) -> Medusa:
        return Medusa(self.config, self.options)

    @classmethod
    def of(cls, head: Any, state_dict: Mapping[str, Tensor] | None = None) -> Any:
        if len(head.d2t) < head.config.vocab_size:
            return own_files.OwnHead.of(head, state_dict)
        return super().of(head, state_dict)

    @property
    def target_name(self) -> str | None:
        """What the target is called, if that is known."""
        return self.base.name if self.base is not None else getattr(self.config, TARGET, None)

    def described(self) -> dict[str, str]:
        options, numbers = self.options, sum(tensor.numel() for tensor in self.tensors)
        print_of = f", fingerprint {self.base.fingerprint}" if self.base is not None else ""
        target = f"{self.target_name or 'not said'}{print_of}"
        return {
            "kind": f"{options.steps} Medusa heads of {options.layers} blocks, {count_text(numbers)} parameters",
            "target": f"{target}; width {self.config.hidden_size}, {self.config.vocab_size} tokens",
            "draft vocabulary": "all tokens",
        }

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        return dict.fromkeys(ENGINES.values(), "it has no model for Medusa heads")

    def document(self) -> dict[str, Any]:
        sizes = {key: getattr(self.config, key) for key in ("hidden_size", "vocab_size")}
        return {HEADS: self.options.steps, BLOCKS: self.options.layers, TARGET: self.target_name, **sizes}

    def written(self) -> dict[str, Tensor]:
        return {name.removeprefix(PREFIX): tensor for name, tensor in super().written().items()}

    def write_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        torch.save(dict(tensors), folder / FILE)

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        """A whole model that was saved with its heads has layers, too, and is read as a model."""
        return bool({HEADS, BLOCKS} & config.keys()) and "num_hidden_layers" not in config

    @classmethod
    def weights(cls, path: str) -> dict[str, Tensor]:
        return read_tensors(path, FILES)

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> MedusaHead:
        at = f"{path}/config.json"
        state = read_tensors(path, FILES, **options)
        state = {f"{PREFIX}{name.removeprefix(PREFIX)}": tensor for name, tensor in state.items()}
        heads, blocks, assumed = _counts(config, state, at)
        output = state.get(f"{PREFIX}0.{blocks}.weight", torch.empty(0))
        if output.ndim != 2:
            raise ValueError(
                f"{path!r} lacks {PREFIX}0.{blocks}.weight, the output layer of head 0 after {blocks} blocks"
            )
        (vocab, width), base = output.shape, cls.base_of(path, **options)
        name = fit(config.get(TARGET), str | None, f"{at}: {TARGET}")
        if name is None and base is None:
            assumed.append(f"{TARGET} is open: taken is any target of width {width} with {vocab} tokens")
        sizes = {"vocab_size": vocab, "hidden_size": width, "num_attention_heads": 1}
        layer: Any = read_layer({**sizes, TARGET: name}, at)
        layer.name_or_path = path
        described = MedusaOptions(steps=heads, layers=blocks)
        with torch.device("meta"):
            whole = Medusa(layer, described)
        check_tensors(path, state, whole, {"embed_tokens.weight", "d2t"})
        if assumed:
            warnings.warn(f"{at}: {'; '.join(assumed)}", stacklevel=2)
        return cls(layer, described, state, base).eval()


def _counts(config: Mapping[str, Any], state: Mapping[str, Tensor], at: str) -> tuple[int, int, list[str]]:
    """How many heads there are and how many blocks each has, and what is assumed of that.

    Published files hold more heads than their config says: all are taken.
    """
    named = [re.match(rf"{re.escape(PREFIX)}(\d+)\.(\d+)\.", name) for name in state]
    found = [(int(match[1]), int(match[2])) for match in named if match]
    there, deep = (max(numbers) for numbers in zip(*found, strict=True)) if found else (-1, 1)
    heads, blocks = (fit(config.get(key), int | None, f"{at}: {key}") for key in (HEADS, BLOCKS))
    assumed = []
    if heads is None or heads <= there:
        if heads != there + 1:
            assumed.append(f"{HEADS} is {'open' if heads is None else heads}: taken are all {there + 1} of the file")
        heads = there + 1
    if blocks is None:
        assumed.append(f"{BLOCKS} is open: taken is {deep}")
        blocks = deep
    if not 0 < heads <= len(state) or not 0 <= blocks <= len(state):
        raise ValueError(
            f"{at}: {HEADS}={heads}, {BLOCKS}={blocks}, and there are {len(state)} tensors; each head has one or "
            "more, and each block two: get the files that belong together"
        )
    return heads, blocks, assumed
