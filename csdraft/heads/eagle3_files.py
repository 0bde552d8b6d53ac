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

from csdraft.amounts import count_text
from csdraft.heads.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.heads.eagle3_engines import LAYERS, NORMS, SPECULATORS, eagle3_faults, named_layers, speculators_document
from csdraft.heads.engines import SIZED_ROTARY, ServedTarget
from csdraft.heads.folder import INIT, Names, check_drafted, check_tensors, read_layer, read_tensors
from csdraft.heads.head import HeadOptions
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit

__all__ = ["EMBEDDING", "Eagle3Head"]

EMBEDDING = "embed_tokens.weight"
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
    methods = {"vllm": "eagle3", "sglang": "EAGLE3", "speculators": "eagle3"}  # noqa: RUF012 - never written to

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
            "kind": f"EAGLE-3 head, {count_text(numbers)} parameters, {', '.join(flags) or 'norms as in the paper'}",
            "target": f"{target}; width {options.target_width}, {config.vocab_size} tokens",
            "hidden states": layers,
            "draft vocabulary": "all tokens" if rows == config.vocab_size else f"{rows} tokens",
            "embedding": "its own" if EMBEDDING in self.names else "the target's",
        }

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hidden states that are open are the paper's. The target's embedding is in it for speculators alone."""
        document, tensors = self.document(self.options.layers or default_layers(target.layers)), self.written()
        if target.positions and self.config.rope_parameters.get("rope_type", "default") in SIZED_ROTARY:
            document["max_position_embeddings"] = max(document["max_position_embeddings"], target.positions)
        if engine == "speculators":
            tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
            if EMBEDDING not in tensors:
                tensors[EMBEDDING] = target.embedding().to(tensors["fc.weight"].dtype, copy=True)
            return speculators_document(document, target, tokens), tensors
        if EMBEDDING in tensors:
            own, theirs = tensors[EMBEDDING], target.embedding()
            if own.shape == theirs.shape and torch.equal(own, theirs.to(own)):
                del tensors[EMBEDDING]
        return document, tensors

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        return eagle3_faults(engine, config, tensors, target)

    def document(self, layers: tuple[int, ...] = ()) -> dict[str, Any]:
        """config.json: every key that vLLM or SGLang reads, also where it has the engines' default.

        Args:
            layers: the hidden states, where `options` leaves them open.
        """
        options, document, layers = self.options, self.config.to_dict(), self.options.layers or layers
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": options.draft_vocab,
            "target_hidden_size": options.target_width,
            "num_hidden_layers": 1,
            "num_aux_hidden_states": len(layers) or _fused(options, self.state),
            "tie_word_embeddings": False,
            "rope_theta": self.config.rope_parameters["rope_theta"],  # where older engines look for it
            **{key: getattr(options, key) for key in NORMS},
            INIT: {"eagle3": {"steps": options.steps, "decay": options.decay}},
        }
        if layers:  # vLLM reads the first, SGLang the second, which counts from 0
            numbers = [k - 1 for k in layers]
            own |= {LAYERS: list(layers), "eagle_config": {LAYERS: numbers, "use_aux_hidden_state": True}}
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
    layers = named_layers(document, at)
    if layers and not document.get(LAYERS):
        assumed.append(
            f"{LAYERS} stands in eagle_config alone, where SGLang and its trainers count blocks from 0: taken are the "
            f"hidden states after blocks {', '.join(map(str, layers))}"
        )
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
    trained = fit(document.get(INIT) or {}, dict[str, Any], f"{at}: {INIT}").get("eagle3") or {}
    how = fit(trained, HeadOptions, f"{at}: {INIT}.eagle3")
    return Eagle3Options(layers, width, rows, **flags, steps=how.steps, decay=how.decay)


def _fused(options: Eagle3Options, state: Mapping[str, Tensor]) -> int:
    """How many hidden states `fc` fuses."""
    return state["fc.weight"].shape[-1] // options.target_width if "fc.weight" in state else 3
