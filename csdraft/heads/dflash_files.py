"""DFlash heads on disk: the published layout, which vLLM, SGLang and speculators' converter read.

`config.json` holds a Qwen 3 layer's config, `block_size` and `dflash_config`; model.safetensors the head without the
embedding and, where it drafts all tokens, without the output layer: both are the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csdraft.amounts import count_text
from csdraft.heads.dflash import Dflash, DflashOptions
from csdraft.heads.eagle3_files import EMBEDDING, KEPT
from csdraft.heads.folder import Names, check_drafted, check_tensors, read_layer, read_tensors
from csdraft.heads.own_files import OUTPUT
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit, shown

__all__ = ["DflashHead"]

KEYS = "dflash_config"
LIKE_QWEN = {"head_dim": 128}
"""Where defaults of a Qwen 3 config differ from those of a Llama one."""
OTHER = {"causal": False, "use_swa": False}
"""Variants that csdraft does not know, and what the layout is without them."""


class DflashHead(StoredHead):
    """A DFlash head without its target."""

    what = "DFlash head"
    lends = StoredHead.lends | OUTPUT

    @property
    def target_width(self) -> int:
        return self.options.target_width

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    @property
    def deepest(self) -> int:
        return self.options.steps

    def check_shape(self, target: Any) -> None:
        super().check_shape(target)
        text = target.config.get_text_config(decoder=True)
        if max(self.options.layers) > text.num_hidden_layers:
            raise ValueError(
                f"{self._name} reads the hidden states after blocks {list(self.options.layers)}, and the target has "
                f"{text.num_hidden_layers} blocks; decode with the head's own target"
            )

    def network(self, target: Any) -> Dflash:
        return Dflash(self.config, self.options)

    def described(self) -> dict[str, str]:
        options, config = self.options, self.config
        size = f"{count_text(sum(tensor.numel() for tensor in self.tensors))} parameters"
        target = f"{self.base.name}, fingerprint {self.base.fingerprint}" if self.base is not None else "not said"
        rows, vocab = options.draft_vocab, config.vocab_size
        return {
            "kind": f"DFlash head of {options.steps} tokens, {options.blocks} layers, {size}",
            "target": f"{target}; width {options.target_width}, {vocab} tokens",
            "hidden states": f"after blocks {', '.join(map(str, options.layers))}",
            "draft vocabulary": "all tokens" if rows == vocab else f"{rows} tokens",
            "placeholders": f"like token {options.mask_token}",
        }

    methods = {"vllm": "dflash", "sglang": "DFLASH"}  # noqa: RUF012 - never written to

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        narrowed = config.get("draft_vocab_size", config.get("vocab_size")) != config.get("vocab_size")
        return {"vLLM": None, "SGLang": "it drafts some tokens alone, by d2t" if narrowed else None}

    def document(self) -> dict[str, Any]:
        options, document = self.options, self.config.to_dict()
        own = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": options.blocks,
            "layer_types": ["full_attention"] * options.blocks,
            "block_size": options.steps + (not options.from_anchor),
            "draft_vocab_size": options.draft_vocab,
            "target_hidden_size": options.target_width,
            "tie_word_embeddings": False,
            "rope_theta": self.config.rope_parameters["rope_theta"],  # where older engines look for it
            KEYS: {
                "mask_token_id": options.mask_token,
                "target_layer_ids": [layer - 1 for layer in options.layers],
                "sample_from_anchor": options.from_anchor,
                **OTHER,
            },
        }
        dtype = self.state["fc.weight"].dtype
        return {key: document.get(key) for key in KEPT} | own | {"dtype": str(dtype).removeprefix("torch.")}

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return "speculators_model_type" not in config and (
            config.get("architectures") == ["DFlashDraftModel"] or KEYS in config
        )

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> DflashHead:
        at = f"{path}/config.json"
        if (family := config.get("model_type", "qwen3")) not in ("qwen3", "llama"):
            raise ValueError(f"{at}: model_type={shown(family)}; csdraft reads DFlash heads with layers of qwen3")
        state = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path, **options).items()}
        state = {name: tensor for name, tensor in state.items() if name != "t2d"}
        defaults = LIKE_QWEN if family == "qwen3" else {}
        layer_keys = {
            key: value for key, value in config.items() if key != "layer_types"
        }  # one for each of its layers
        layer = read_layer({**defaults, **layer_keys, "model_type": "llama"}, at)
        layer.name_or_path = path
        described = _options(config, state, layer.vocab_size, at)
        with torch.device("meta"):
            whole = Dflash(layer, described)
        full = described.draft_vocab == layer.vocab_size
        check_tensors(path, state, whole, {EMBEDDING, "d2t", "lm_head.weight"} if full else {EMBEDDING})
        check_drafted(state, layer.vocab_size, path)
        return cls(layer, described, state, cls.base_of(path, **options)).eval()


def _options(config: Mapping[str, Any], state: Mapping[str, Tensor], vocab: int, at: str) -> DflashOptions:
    """What config.json says of a head."""
    keys = fit(config.get(KEYS) or {}, dict[str, Any], f"{at}: {KEYS}")
    for key, wanted in OTHER.items():
        if keys.get(key, wanted) != wanted:
            raise ValueError(f"{at}: {KEYS}.{key}={shown(keys[key])}; csdraft reads DFlash heads with {wanted} there")
    if any(kind != "full_attention" for kind in fit(config.get("layer_types") or [], list[Any], f"{at}: layer_types")):
        raise ValueError(f"{at}: layer_types={shown(config['layer_types'])}; csdraft reads full_attention alone")
    length = fit(config.get("block_size") or keys.get("block_size"), int, f"{at}: block_size")
    layers = fit(keys.get("target_layer_ids"), tuple[int, ...], f"{at}: {KEYS}.target_layer_ids")
    mask = fit(keys.get("mask_token_id"), int, f"{at}: {KEYS}.mask_token_id")
    anchor = fit(keys.get("sample_from_anchor", False), bool, f"{at}: {KEYS}.sample_from_anchor")
    blocks = fit(config.get("num_hidden_layers"), int, f"{at}: num_hidden_layers")
    rows = len(state["d2t"]) if "d2t" in state else vocab
    width = fit(config.get("target_hidden_size") or config.get("hidden_size"), int, f"{at}: target_hidden_size")
    steps = length - (not anchor)
    if min(steps, blocks, width) < 1 or not layers or min(layers) < 0 or not 0 <= mask < vocab:
        raise ValueError(
            f"{at}: block_size={length}, num_hidden_layers={blocks}, target_layer_ids={list(layers)}, "
            f"mask_token_id={mask}; blocks have a placeholder or more, layers are counted from 0, and the mask token "
            f"is below {vocab}"
        )
    return DflashOptions(
        tuple(layer + 1 for layer in layers), width, rows, mask, blocks, steps, from_anchor=anchor
    )  # fmt: skip
