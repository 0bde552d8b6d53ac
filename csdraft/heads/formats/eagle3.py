"""EAGLE-3's original layout, which SGLang and vLLM load, and that of speculators.

csdraft writes the original layout. config.json has the keys of both engines; model.safetensors has the head alone,
without the embedding, which is the target's. `drafter.json` beside them names the target; engines do not read it.
Published heads leave things open: loading one warns of what it assumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from csdraft.heads.engines import EMBEDDING, SIZED_ROTARY, ServedTarget, with_embedding, without_embedding
from csdraft.heads.folder import INIT, Names, as_llama, read_layer, read_tensors
from csdraft.heads.formats._eagle3_engines import (
    FAMILIES,
    LAYERS,
    NORMS,
    OLD_FLAG,
    eagle3_faults,
    named_layers,
    of_norm,
    speculators_document,
)
from csdraft.heads.formats._speculators import COPIES, LAYER, MODEL_TYPE
from csdraft.heads.head import HeadOptions
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit

__all__ = ["Eagle3Head"]


class Eagle3Head(StoredHead):
    """An EAGLE-3 head without its target; `layers` of its options is empty if its config does not name them."""

    what = "EAGLE-3 head"
    methods = {"vllm": "eagle3", "sglang": "EAGLE3", "speculators": "eagle3"}  # noqa: RUF012 - never written to
    complete = Eagle3

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    def check_shape(self, target: Any) -> None:
        super().check_shape(target)
        width = target.config.get_text_config(decoder=True).hidden_size
        if EMBEDDING not in self.names and self.config.hidden_size != width:
            raise ValueError(
                f"{self._name} has width {self.config.hidden_size} and no {EMBEDDING}, the target's embedding has "
                f"width {width}; the folder must hold an embedding"
            )

    def network(self, target: Any = None) -> Eagle3:
        layers = self.options.layers
        if not layers and target is None:
            layers = (0,) * self._fused
        elif not layers:
            layers = default_layers(target.config.get_text_config(decoder=True).num_hidden_layers)
        return self.complete(self.config, replace(self.options, layers=layers))

    @property
    def _fused(self) -> int:
        """How many hidden states `fc` fuses."""
        return self.state["fc.weight"].shape[-1] // self.options.target_width if "fc.weight" in self.names else 3

    def details(self) -> dict[str, str]:
        layers, flags = self.options.layers, [name for name in NORMS if getattr(self.options, name)]
        return {
            "norms": ", ".join([*flags, *["queries and keys"] * self.options.qk_norm]) or "as in the paper",
            "hidden states": f"after blocks {', '.join(map(str, layers))}" if layers else "the paper's (not said)",
            "embedding": "its own" if EMBEDDING in self.names else "the target's",
        }

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Names the paper's hidden states if the head leaves them open. For speculators it adds the embedding."""
        document, tensors = self.document(self.options.layers or default_layers(target.layers)), self.written()
        if target.positions and self.config.rope_parameters.get("rope_type", "default") in SIZED_ROTARY:
            document["max_position_embeddings"] = max(document["max_position_embeddings"], target.positions)
        if engine == "speculators":
            return speculators_document(document, target, tokens), with_embedding(numbered(tensors), target)
        return document, without_embedding(tensors, target)

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        return eagle3_faults(engine, config, tensors, target)

    def document(self, layers: tuple[int, ...] = ()) -> dict[str, Any]:
        """config.json: every key that vLLM or SGLang reads, even if its value is the engines' default.

        Args:
            layers: the hidden states, if `options` leaves them open.
        """
        options, layers = self.options, self.options.layers or layers
        family = "qwen3" if options.qk_norm else "llama"
        document = self.layer_document() | {
            "model_type": family,
            "architectures": [FAMILIES[family]],
            "draft_vocab_size": options.draft_vocab,
            "target_hidden_size": options.target_width,
            "num_hidden_layers": 1,
            "num_aux_hidden_states": len(layers) or self._fused,
            **{key: getattr(options, key) for key in NORMS},
            INIT: {"eagle3": {"steps": options.steps, "decay": options.decay}},
        }
        if layers:  # vLLM reads the first, SGLang the second, which counts from 0
            numbers = [k - 1 for k in layers]
            document |= {LAYERS: list(layers), "eagle_config": {LAYERS: numbers, "use_aux_hidden_state": True}}
        return document

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        if config.get(MODEL_TYPE, "eagle3") != "eagle3":
            return False
        made_for = config.get("architectures") or ()
        named = any("eagle3" in str(name).lower() for name in made_for) if isinstance(made_for, list) else False
        if named or MODEL_TYPE in config or "draft_vocab_size" in config:
            return True
        if made_for not in (["LlamaForCausalLM"], ()) or config.get("model_type", "llama") != "llama":
            return False
        found = {_own_name(name) for name in names()}  # published heads have the architecture of every Llama model
        return {"fc.weight", "midlayer.hidden_norm.weight"} <= found

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> Eagle3Head:
        at, assumed = f"{path}/config.json", []
        layer_keys = fit(config.get(LAYER) or {}, dict[str, Any], f"{at}: {LAYER}")
        document = {**layer_keys, **{key: value for key, value in config.items() if key != LAYER}}
        state = {_own_name(name): tensor for name, tensor in read_tensors(path, **options).items()}
        state = {name: tensor for name, tensor in state.items() if name not in COPIES}
        described = cls.options_of(document, state, at, assumed)
        layer = read_layer(as_llama(document, path), path)
        return cls.checked(path, layer, described, state, assumed, **options)

    @classmethod
    def options_of(
        cls, document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]
    ) -> Eagle3Options:
        """A head's options, from config.json, and from its tensors where config.json leaves them open.

        Args:
            document: config.json, with the keys of the layer among the others.
            at: the file, for messages.
            assumed: receives what is assumed.
        """
        if (count := document.get("num_hidden_layers", 1)) != 1:
            assumed.append(f"num_hidden_layers={count} is the target's: an EAGLE-3 head has 1 layer")
        return _options(document, state, at, assumed)


def numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that speculators gives them."""
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def _own_name(name: str) -> str:
    """A tensor's name in `Eagle3`; engines also read it with `model.` in front, and the layer with its number."""
    name = of_norm(name.removeprefix("model."))
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _options(document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]) -> Eagle3Options:
    """See `Eagle3Head.options_of`."""
    eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
    layers = named_layers(document, at)
    if not layers:
        assumed.append(f"{LAYERS} is not set: the paper's are assumed, after blocks 2, L/2 and L - 3 of the target")
    elif not document.get(LAYERS):
        assumed.append(
            f"{LAYERS} is in eagle_config alone, where SGLang and its trainers count blocks from 0: assumed are the "
            f"hidden states after blocks {', '.join(map(str, layers))}"
        )
    if min(layers, default=0) < 0:  # as a tap, -1 is the last hidden state
        raise ValueError(f"{at}: {LAYERS} names the hidden states {list(layers)}; they are counted from 0")
    flags = {key: fit(document.get(key, eagle.get(key, False)) or False, bool, f"{at}: {key}") for key in NORMS}
    flags["fc_norm"] |= fit(document.get(OLD_FLAG) or False, bool, f"{at}: {OLD_FLAG}")
    if MODEL_TYPE in document and "norm_before_residual" not in document:
        assumed.append("norm_before_residual is not set: false is assumed, as in speculators but not in vLLM")
    vocab = fit(document.get("vocab_size"), int, f"{at}: vocab_size")
    rows = document.get("draft_vocab_size")
    if rows is None:
        rows = len(state["lm_head.weight"]) if "lm_head.weight" in state else vocab
        assumed.append(f"draft_vocab_size is not set: {rows} is assumed")
    width = fit(document.get("target_hidden_size") or document.get("hidden_size"), int, f"{at}: target_hidden_size")
    if min(width, fit(rows, int, f"{at}: draft_vocab_size"), vocab) < 1:
        raise ValueError(
            f"{at}: target_hidden_size={width}, draft_vocab_size={rows}, vocab_size={vocab}; all are 1 or more"
        )
    trained = fit(document.get(INIT) or {}, dict[str, Any], f"{at}: {INIT}").get("eagle3") or {}
    how = fit(trained, HeadOptions, f"{at}: {INIT}.eagle3")
    qwen = document.get("model_type") == "qwen3"
    sizes = {"layers": layers, "target_width": width, "draft_vocab": rows, "steps": how.steps, "decay": how.decay}
    return Eagle3Options(**sizes, **flags, qk_norm=qwen)
