"""EAGLE-3 heads on disk: the layout of the original code, which SGLang and vLLM load, and that of speculators.

csdraft writes the first: config.json with the keys of both engines, and model.safetensors with the head alone, without
the embedding, which is the target's. `drafter.json` beside it says which target that was; engines do not read it.
Published heads leave things open: what is assumed of one is said in a warning when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.heads.stored_head import Names, StoredHead, check_drafted, check_tensors, read_layer, read_tensors
from csdraft.stored import fit

__all__ = ["EMBEDDING", "Eagle3Head"]

EMBEDDING = "embed_tokens.weight"
LAYERS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = "transformer_layer_config"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
KEPT = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "attention_bias",
        "mlp_bias", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
        "transformers_version")  # fmt: skip
"""Keys of a layer's config that are written; of the others a `LlamaConfig` has defaults."""
OF_TRAINING = {"verifier_norm.weight", "verifier_lm_head.weight"}
"""Copies of the target's that speculators may leave in a folder."""


class Eagle3Head(StoredHead):
    """An EAGLE-3 head without its target; `layers` of its options is empty where its config does not name them."""

    what = "EAGLE-3 head"

    @property
    def target_width(self) -> int:
        return self.options.target_width

    def check_shape(self, target: Any) -> None:
        super().check_shape(target)
        text = target.config.get_text_config(decoder=True)
        layers = self.options.layers or default_layers(text.num_hidden_layers)
        if max(layers) > text.num_hidden_layers:
            raise ValueError(
                f"{self._name} reads the hidden states after blocks {list(layers)}, and the target has "
                f"{text.num_hidden_layers} blocks; decode with the head's own target"
            )
        if EMBEDDING not in self.names and self.config.hidden_size != text.hidden_size:
            raise ValueError(
                f"{self._name} has width {self.config.hidden_size} and no {EMBEDDING}, the target's embedding has "
                f"width {text.hidden_size}; the folder must hold an embedding"
            )

    def network(self, target: Any) -> Eagle3:
        layers = self.options.layers or default_layers(target.config.get_text_config(decoder=True).num_hidden_layers)
        return self.complete(self.config, replace(self.options, layers=layers))

    @classmethod
    def complete(cls, config: Any, options: Any) -> Eagle3:
        """A head of these sizes."""
        return Eagle3(config, options)

    def described(self) -> dict[str, str]:
        options, config = self.options, self.config
        layers = f"after blocks {', '.join(map(str, options.layers))}" if options.layers else "the paper's (not said)"
        rows, numbers = options.draft_vocab, sum(tensor.numel() for tensor in self.tensors)
        target = f"{self.base.name}, fingerprint {self.base.fingerprint}" if self.base is not None else "not said"
        flags = [name for name in NORMS if getattr(options, name)]
        return {
            "kind": f"EAGLE-3 head, {numbers / 1e6:.1f} M parameters, {', '.join(flags) or 'as in the paper'}",
            "target": f"{target}; width {options.target_width}, {config.vocab_size} tokens",
            "hidden states": layers,
            "draft vocabulary": "all tokens" if rows == config.vocab_size else f"{rows} tokens",
            "embedding": "its own" if EMBEDDING in self.names else "the target's",
        }

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        if SPECULATORS in config:
            return {"vLLM": None, "SGLang": "it reads no folders of speculators"}
        eagle, reasons = config.get("eagle_config") or {}, []
        if config.get("architectures") != ["LlamaForCausalLMEagle3"]:
            reasons.append(f"architectures={config.get('architectures')} is not ['LlamaForCausalLMEagle3']")
        if "draft_vocab_size" not in config:
            reasons.append("draft_vocab_size is missing")
        if config.get(LAYERS) and not eagle.get(LAYERS):
            reasons.append(f"{LAYERS} is not in eagle_config, where it looks: it would take the default")
        if config.get("norm_before_residual"):
            reasons.append("norm_before_residual is true, which it does not know")
        return {"vLLM": None, "SGLang": "; ".join(reasons) or None}

    def document(self) -> dict[str, Any]:
        """config.json: every key that vLLM or SGLang reads, also where it has the engines' default."""
        options, document = self.options, self.config.to_dict()
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": options.draft_vocab,
            "target_hidden_size": options.target_width,
            "num_hidden_layers": 1,
            "num_aux_hidden_states": len(options.layers) or 3,
            "tie_word_embeddings": False,
            "rope_theta": self.config.rope_parameters["rope_theta"],  # where older engines look for it
            **{key: getattr(options, key) for key in NORMS},
        }
        if options.layers:
            layers = list(options.layers)
            own |= {LAYERS: layers, "eagle_config": {LAYERS: layers, "use_aux_hidden_state": True}}
        dtype = self.state["fc.weight"].dtype
        return {key: document.get(key) for key in KEPT} | own | {"dtype": str(dtype).removeprefix("torch.")}

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        if config.get("speculators_model_type", "eagle3") != "eagle3":
            return False
        made_for = config.get("architectures") or ()
        named = any("eagle3" in str(name).lower() for name in made_for) if isinstance(made_for, list) else False
        if named or "speculators_model_type" in config or "draft_vocab_size" in config:
            return True
        if made_for not in (["LlamaForCausalLM"], ()) or config.get("model_type", "llama") != "llama":
            return False
        found = {_own_name(name) for name in names()}  # published heads call themselves as every Llama model does
        return {"fc.weight", "midlayer.hidden_norm.weight"} <= found

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> Eagle3Head:
        at, assumed = f"{path}/config.json", []
        layer_keys = fit(config.get(SPECULATORS) or {}, dict[str, Any], f"{at}: {SPECULATORS}")
        document = {**layer_keys, **{key: value for key, value in config.items() if key != SPECULATORS}}
        state = {_own_name(name): tensor for name, tensor in read_tensors(path, **options).items()}
        state = {name: tensor for name, tensor in state.items() if name != "t2d" and name not in OF_TRAINING}
        described = cls.options_of(document, state, at, assumed)
        layer = read_layer(document, at)
        layer.name_or_path = path
        with torch.device("meta"):
            layers = described.layers or (0,) * _fused(described, state)
            whole = cls.complete(layer, replace(described, layers=layers))
        full = described.draft_vocab == layer.vocab_size
        check_tensors(path, state, whole, {EMBEDDING, "d2t"} if full else {EMBEDDING})
        check_drafted(state, layer.vocab_size, path)
        if assumed:
            warnings.warn(f"{at}: {'; '.join(assumed)}", stacklevel=2)
        return cls(layer, described, state, cls.base_of(path, **options)).eval()

    @classmethod
    def options_of(
        cls, document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]
    ) -> Eagle3Options:
        """What config.json says of a head, and what its tensors say where that is open.

        Args:
            document: with the keys of the layer's config among the others.
            at: the file, which messages name.
            assumed: takes what is assumed.
        """
        if (count := document.get("num_hidden_layers", 1)) != 1:
            assumed.append(f"num_hidden_layers={count} is the target's: an EAGLE-3 head has 1 layer")
        return _options(document, state, at, assumed)


def _own_name(name: str) -> str:
    """A tensor's name in `Eagle3`: engines also know it with `model.` in front, and the layer by its number."""
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _options(document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]) -> Eagle3Options:
    """What config.json says of a head, and what its tensors say where that is open."""
    eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
    layers = document.get(LAYERS) or eagle.get(LAYERS)
    if not layers:
        assumed.append(f"{LAYERS} is open: taken are the paper's, after blocks 2, L/2 and L - 3 of the target")
    flags = {key: fit(document.get(key, eagle.get(key, False)) or False, bool, f"{at}: {key}") for key in NORMS}
    if SPECULATORS in document and "norm_before_residual" not in document:
        assumed.append("norm_before_residual is open: taken is false, as speculators does and vLLM does not")
    vocab = fit(document.get("vocab_size"), int, f"{at}: vocab_size")
    rows = document.get("draft_vocab_size")
    if rows is None:
        rows = len(state["lm_head.weight"]) if "lm_head.weight" in state else vocab
        assumed.append(f"draft_vocab_size is open: taken is {rows}")
    width = fit(document.get("target_hidden_size") or document.get("hidden_size"), int, f"{at}: target_hidden_size")
    if min(width, fit(rows, int, f"{at}: draft_vocab_size"), vocab) < 1:
        raise ValueError(
            f"{at}: target_hidden_size={width}, draft_vocab_size={rows}, vocab_size={vocab}; all are 1 or more"
        )
    return Eagle3Options(
        fit(layers or (), tuple[int, ...], f"{at}: {LAYERS}"),
        width,
        rows,
        **flags,
    )


def _fused(options: Eagle3Options, state: Mapping[str, Tensor]) -> int:
    """How many hidden states `fc` fuses."""
    return state["fc.weight"].shape[-1] // options.target_width if "fc.weight" in state else 3
