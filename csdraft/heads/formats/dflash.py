"""DFlash's published layout, which vLLM, SGLang and speculators' converter read, and that of speculators.

csdraft writes the published one. `config.json` holds a Qwen 3 layer's config, `block_size` and `dflash_config`.
model.safetensors holds the head without the embedding, and without the output layer if it drafts all tokens: both are
the target's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from csdraft.heads.engines import EMBEDDING, Found, ServedTarget
from csdraft.heads.folder import Names, read_layer
from csdraft.heads.formats._speculators import COPIES, LAYER, MODEL_TYPE, speculators_document
from csdraft.heads.kinds.dflash import Dflash, DflashOptions
from csdraft.heads.self_draft import Lender
from csdraft.heads.stored_head import LAYER_KEYS, Parts, StoredHead
from csdraft.stored import fit, shown

__all__ = ["DflashHead"]

KEYS, IDS, NOT_CAUSAL = "dflash_config", "aux_hidden_state_layer_ids", "sliding_window_non_causal"
OUTPUT_LAYER = "lm_head.weight"
OTHER = {
    "causal": False, "is_causal": False, "use_swa": False, "is_neox_style": True, "use_gemma_norm": False,
    "attention_sink_bias": False, "add_swa_attention_sink_bias": False, "attention_value_scale": 1.0,
    "final_logit_softcapping": 0.0, "output_multiplier": 1.0, "conv_kernel_size": 0, "selector_rank": 0,
    "projector_type": None,
}  # fmt: skip
"""Keys of variants that csdraft cannot read, with the values of the layout that it reads."""
WRITTEN = {"causal": False, "use_swa": False}


class DflashHead(StoredHead):
    """A DFlash head without its target."""

    what, complete = "DFlash head", Dflash
    methods = {"vllm": "dflash", "sglang": "DFLASH", "speculators": "dflash"}  # noqa: RUF012 - never written to

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    @property
    def deepest(self) -> int:
        return self.options.steps

    @property
    def title(self) -> str:
        return f"DFlash head of {self.options.steps} tokens, {self.options.blocks} layers"

    def details(self) -> dict[str, str]:
        return {
            "hidden states": f"after blocks {', '.join(map(str, self.options.layers))}",
            "placeholders": f"like token {self.options.mask_token}",
        }

    def refusals(self, engine: str, names: Collection[str]) -> Iterator[str]:
        options = self.options
        if engine == "sglang" and "d2t" in self.names:
            yield "it drafts some tokens alone, by d2t"
        if engine == "sglang" and options.target_width != self.config.hidden_size:
            yield f"target_hidden_size={options.target_width} must be hidden_size for it; use --to vllm"
        if options.from_anchor:
            yield "sample_from_anchor is true, and it drafts from placeholders alone"
        if engine != "vllm":
            theirs = sorted(self._lent & {name.removeprefix("model.") for name in names})
            yield from (f"{name}: it takes the target's instead; use --to vllm" for name in theirs)

    def places(self, engine: str, said: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        return {NOT_CAUSAL: [True, None]} if engine == "vllm" else {}  # vLLM would take false for all layers

    @property
    def _lent(self) -> set[str]:
        """The tensors that the target can lend it."""
        return {EMBEDDING} if "d2t" in self.names else {EMBEDDING, OUTPUT_LAYER}

    def as_read(self, engine: str, tensors: Mapping[str, Tensor]) -> Found:
        if engine == "sglang":
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return tensors, self._lent, super().as_read(engine, tensors)[2]

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The published layout, or that of speculators."""
        document, options = self.document(), self.options
        if engine != "speculators":
            return document, self.written()
        layer = {key: document[key] for key in (*LAYER_KEYS, "num_hidden_layers", "layer_types")}
        own = {key: document[key] for key in ("block_size", "draft_vocab_size", "target_hidden_size", "dtype")}
        own |= {IDS: list(options.layers), "mask_token_id": options.mask_token}
        # The package reads the last of other layers only; to vLLM false would mean causal attention in all.
        own |= {"sample_from_anchor": options.from_anchor, NOT_CAUSAL: True}
        serves = target.name, target.architectures, tokens
        return speculators_document("dflash", "DFlashSpeculator", layer, *serves, **own), self.written()

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
                **WRITTEN,
            },
        }

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        if MODEL_TYPE in config:
            return config[MODEL_TYPE] == "dflash"
        return config.get("architectures") == ["DFlashDraftModel"] or KEYS in config

    @classmethod
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        state, ignored = {name.removeprefix("model."): tensor for name, tensor in state.items()}, {"t2d"}
        if MODEL_TYPE in config:
            config = _published(config, f"{path}/config.json")
            ignored = {*COPIES, EMBEDDING} | ({OUTPUT_LAYER} if "d2t" not in state else set())  # copies, too
        state = {name: tensor for name, tensor in state.items() if name not in ignored}
        layer = read_layer({"model_type": "qwen3", **config}, path, ("llama", "qwen3"))
        return layer, _options(config, state, layer.vocab_size, path), state, []


def _published(config: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The config.json of the published layout, from one of speculators."""
    layer = fit(config.get(LAYER), dict[str, Any], f"{at}: {LAYER}")
    layers = fit(config.get(IDS), tuple[int, ...], f"{at}: {IDS}")
    if 0 in layers:
        raise ValueError(f"{at}: {IDS}={list(layers)}; csdraft reads no DFlash heads that read the embeddings, 0")
    keys = {key: config[key] for key in ("mask_token_id", "sample_from_anchor") if key in config}
    own = {key: config[key] for key in ("block_size", "draft_vocab_size", "target_hidden_size") if key in config}
    return {**layer, **own, KEYS: {**keys, "target_layer_ids": [number - 1 for number in layers]}}


def _options(config: Mapping[str, Any], state: Mapping[str, Tensor], vocab: int, path: str) -> DflashOptions:
    """A head's options, from config.json."""
    at = f"{path}/config.json"
    keys = fit(config.get(KEYS) or {}, dict[str, Any], f"{at}: {KEYS}")
    for key, wanted in OTHER.items():
        if (found := keys.get(key, config.get(key))) not in (None, wanted):
            raise ValueError(f"{at}: {key}={shown(found)}; csdraft reads DFlash heads with {wanted} there")
    length = fit(config.get("block_size") or keys.get("block_size"), int, f"{at}: block_size")
    layers = fit(keys.get("target_layer_ids"), tuple[int, ...], f"{at}: {KEYS}.target_layer_ids")
    mask = fit(keys.get("mask_token_id"), int, f"{at}: {KEYS}.mask_token_id")
    anchor = fit(keys.get("sample_from_anchor", False), bool, f"{at}: {KEYS}.sample_from_anchor")
    blocks = fit(config.get("num_hidden_layers"), int, f"{at}: num_hidden_layers")
    width = fit(config.get("target_hidden_size") or config.get("hidden_size"), int, f"{at}: target_hidden_size")
    rows = fit(config.get("draft_vocab_size"), int | None, f"{at}: draft_vocab_size")
    rows = (len(state["d2t"]) if "d2t" in state else vocab) if rows is None else rows
    steps = length - (not anchor)
    if min(steps, blocks, width, rows) < 1 or not layers or min(layers) < 0 or not 0 <= mask < vocab:
        raise ValueError(
            f"{at}: block_size={length}, num_hidden_layers={blocks}, target_layer_ids={list(layers)}, "
            f"mask_token_id={mask}, draft_vocab_size={rows}; blocks have a placeholder or more, layers are counted "
            f"from 0, and the mask token is below {vocab}"
        )
    sizes = {"target_width": width, "draft_vocab": rows, "mask_token": mask, "blocks": blocks, "steps": steps}
    return DflashOptions(layers=tuple(layer + 1 for layer in layers), from_anchor=anchor, **sizes)
