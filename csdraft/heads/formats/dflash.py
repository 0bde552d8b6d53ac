"""DFlash's published layout, which vLLM, SGLang and speculators' converter read.

`config.json` holds a Qwen 3 layer's config, `block_size` and `dflash_config`. model.safetensors holds the head without
the embedding, and without the output layer if it drafts all tokens: both are the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from csdraft.heads.folder import Names, read_layer, read_tensors
from csdraft.heads.kinds.dflash import Dflash, DflashOptions
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit, shown

__all__ = ["DflashHead"]

KEYS = "dflash_config"
LIKE_QWEN = {"head_dim": 128}
"""Where the defaults of a Qwen 3 config differ from those of a Llama one."""
OTHER = {"causal": False, "use_swa": False}
"""Variants that csdraft cannot read, with the values of the layout that it reads."""


class DflashHead(StoredHead):
    """A DFlash head without its target."""

    what = "DFlash head"
    methods = {"vllm": "dflash", "sglang": "DFLASH"}  # noqa: RUF012 - never written to

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    @property
    def deepest(self) -> int:
        return self.options.steps

    def network(self, target: Any = None) -> Dflash:
        return Dflash(self.config, self.options)

    @property
    def title(self) -> str:
        return f"DFlash head of {self.options.steps} tokens, {self.options.blocks} layers"

    def details(self) -> dict[str, str]:
        return {
            "hidden states": f"after blocks {', '.join(map(str, self.options.layers))}",
            "placeholders": f"like token {self.options.mask_token}",
        }

    def refusals(self, engine: str, config: Mapping[str, Any]) -> list[str]:
        if engine == "sglang" and config.get("draft_vocab_size", config.get("vocab_size")) != config.get("vocab_size"):
            return ["it drafts some tokens alone, by d2t"]
        return super().refusals(engine, config)

    def document(self) -> dict[str, Any]:
        options = self.options
        return self.layer_document() | {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": options.blocks,
            "layer_types": ["full_attention"] * options.blocks,
            "block_size": options.steps + (not options.from_anchor),
            "draft_vocab_size": options.draft_vocab,
            "target_hidden_size": options.target_width,
            KEYS: {
                "mask_token_id": options.mask_token,
                "target_layer_ids": [layer - 1 for layer in options.layers],
                "sample_from_anchor": options.from_anchor,
                **OTHER,
            },
        }

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return "speculators_model_type" not in config and (
            config.get("architectures") == ["DFlashDraftModel"] or KEYS in config
        )

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> DflashHead:
        if (family := config.get("model_type", "qwen3")) not in ("qwen3", "llama"):
            at = f"{path}/config.json"
            raise ValueError(f"{at}: model_type={shown(family)}; csdraft reads DFlash heads with layers of qwen3")
        state = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path, **options).items()}
        state.pop("t2d", None)
        defaults = LIKE_QWEN if family == "qwen3" else {}
        layer_keys = {key: value for key, value in config.items() if key != "layer_types"}  # one entry a layer
        layer = read_layer({**defaults, **layer_keys, "model_type": "llama"}, path)
        return cls.checked(path, layer, _options(config, state, layer.vocab_size, path), state, **options)


def _options(config: Mapping[str, Any], state: Mapping[str, Tensor], vocab: int, path: str) -> DflashOptions:
    """A head's options, from config.json."""
    at = f"{path}/config.json"
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
    width = fit(config.get("target_hidden_size") or config.get("hidden_size"), int, f"{at}: target_hidden_size")
    rows, steps = len(state["d2t"]) if "d2t" in state else vocab, length - (not anchor)
    if min(steps, blocks, width) < 1 or not layers or min(layers) < 0 or not 0 <= mask < vocab:
        raise ValueError(
            f"{at}: block_size={length}, num_hidden_layers={blocks}, target_layer_ids={list(layers)}, "
            f"mask_token_id={mask}; blocks have a placeholder or more, layers are counted from 0, and the mask token "
            f"is below {vocab}"
        )
    numbers = tuple(layer + 1 for layer in layers)
    return DflashOptions(numbers, width, rows, mask, blocks, steps, from_anchor=anchor)
