"""EAGLE-3's original layout, which SGLang and vLLM load, and that of speculators.

csdraft writes the original layout. config.json has the keys of both engines; model.safetensors has the head alone,
without the embedding, which is the target's. `drafter.json` beside them names the target; engines do not read it.
Published heads leave things open: loading one warns of what it assumes.

For a missing or unknown tensor vLLM raises an error. SGLang and the package speculators use random numbers, or ignore
it. All of these count as refused here.

Engines number the target's hidden states in two ways. At the top level of config.json, which vLLM and speculators
read, k is the state after k blocks. In `eagle_config`, which SGLang reads, the same state is k - 1, the number of the
block that computes it. So a folder for both has different numbers in the two places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from csdraft.heads.engines import EMBEDDING, Found, ServedTarget
from csdraft.heads.folder import INIT, Names, read_layer
from csdraft.heads.formats._speculators import COPIES, LAYER, MODEL_TYPE, speculators_document, value_at
from csdraft.heads.head import HeadOptions
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options, default_layers
from csdraft.heads.self_draft import Lender
from csdraft.heads.stored_head import Parts, StoredHead
from csdraft.stored import fit

__all__ = ["OF_HEAD", "Eagle3Head", "numbered"]

T = TypeVar("T")

LAYERS, USE_AUX = "eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
OLD_FLAG, OLD_NAMES = "use_aux_norm", ("aux_norm_low.", "aux_norm_mid.", "aux_norm_high.")
"""What `fc_norm` and its three norms were once called; SGLang reads them still."""
FAMILIES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
"""Families of the layer -> the architecture that is written. Qwen 3 norms queries and keys."""
TAKEN = {
    ("vllm", "llama"): (FAMILIES["llama"], "Eagle3LlamaForCausalLM", "LlamaForCausalLM"),
    ("vllm", "qwen3"): (FAMILIES["qwen3"], "Qwen3ForCausalLM"),
    ("sglang", "llama"): (FAMILIES["llama"],),
}
"""Engine and family -> the architectures that it takes in the original layout; vLLM puts Eagle3 in front of others."""
OF_HEAD = ("draft_vocab_size", "target_hidden_size", *NORMS, LAYERS)
"""Keys that are outside `transformer_layer_config`."""
NOT_OF_LAYER = (*OF_HEAD, "eagle_config", "architectures", "rope_theta", "dtype", "transformers_version")


class Eagle3Head(StoredHead):
    """An EAGLE-3 head without its target; `layers` of its options is empty if its config does not name them."""

    what, complete = "EAGLE-3 head", Eagle3
    methods = {"vllm": "eagle3", "sglang": "EAGLE3", "speculators": "eagle3"}  # noqa: RUF012 - never written to
    embedding_for = ("speculators",)  # it means to load the target's, but uses uninitialised memory

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    def check(self, target: Any) -> None:
        super().check(target)
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
        }

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Names the paper's hidden states if the head leaves them open."""
        document = self.document(self.options.layers or default_layers(target.layers))
        if engine != "speculators":
            return document, self.written()
        own = {key: document[key] for key in (*OF_HEAD, "dtype")} | {"embed_requires_grad": False}
        # It keeps num_aux_hidden_states, without which vLLM takes 3 hidden states.
        layer = {key: value for key, value in document.items() if key not in NOT_OF_LAYER}
        serves = target.name, target.architectures, tokens
        return speculators_document("eagle3", "Eagle3DraftModel", layer, *serves, **own), numbered(self.written())

    def refusals(self, engine: str, names: Collection[str]) -> Iterator[str]:
        options, width = self.options, self.config.hidden_size
        if engine == "speculators" and options.norm_before_fc and options.fc_norm:
            yield "norm_before_fc and fc_norm are both true, and it takes one of them; use --to vllm"
        if engine == "speculators" and not options.layers and self._fused != 3:
            yield f"{LAYERS} is missing, and it would fuse 3 hidden states; this head fuses {self._fused}"
        if engine != "sglang":
            return
        flags = {key: getattr(self.config, key) for key in ("attention_bias", "mlp_bias")}
        flags |= {key: getattr(options, key) for key in ("norm_before_residual", "qk_norm")}
        yield from (f"{key} is true, and it knows no such heads; use --to vllm" for key in flags if flags[key])
        if self._fused * self.target_width == width:
            yield (
                f"{self._fused} hidden states of target_hidden_size={self.target_width} are as wide as hidden_size, "
                "and then it leaves fc out; use --to vllm, or fuse more hidden states"
            )
        if EMBEDDING in names and self.target_width == width:
            yield f"{EMBEDDING}: it takes the target's embedding instead; use --to vllm"

    def places(self, engine: str, said: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        options, layers, of_sglang = self.options, list(self.options.layers), engine == "sglang"
        family, inner = "qwen3" if options.qk_norm else "llama", f"eagle_config.{LAYERS}"
        named = value_at(said, inner)
        counted = (len(named) if named and isinstance(named, list) else 3) == self._fused
        nested = MODEL_TYPE in said or LAYER in said
        layer = f"{LAYER}." if nested else ""  # engines read these keys there alone
        right: dict[str, Any] = {
            f"{layer}model_type": [family],
            f"{layer}num_hidden_layers": [1],
            f"{layer}num_aux_hidden_states": [self._fused, *[None] * counted],
            f"{layer}hidden_act": ["silu", None],
            "hidden_act": ["silu", None],  # where csdraft reads it first
            f"{layer}rope_theta": [self.config.rope_parameters["rope_theta"], None],
            "target_hidden_size": [self.target_width, *[None] * (self.target_width == self.config.hidden_size)],
            "draft_vocab_size": [options.draft_vocab, *[None] * (not of_sglang and "d2t" not in self.names)],
            f"eagle_config.{USE_AUX}": [True, *[None] * (USE_AUX not in (said.get("eagle_config") or {}))],
        }
        for key in NORMS:
            flag, old = getattr(options, key), of_sglang and key == "fc_norm" and said.get(OLD_FLAG)
            right |= {key: [flag] if flag and not old else [flag, False, None], f"eagle_config.{key}": [flag, None]}
        if of_sglang:
            right |= {key: [False, None] for key in ("bias", "tie_word_embeddings")}  # it ignores them
        if layers:
            right |= {inner: [[k - 1 for k in layers]]} if of_sglang else {LAYERS: [layers]}
        if not nested:
            right |= {"architectures[0]": TAKEN[engine, family]} if (engine, family) in TAKEN else {}
        return right

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return numbered(super().shapes())

    def as_read(self, engine: str, tensors: Mapping[str, Tensor]) -> Found:
        _, optional, ignored = super().as_read(engine, tensors)
        if self.target_width != self.config.hidden_size:  # the target's embedding does not fit
            optional = set()
        if engine == "sglang":  # which does not look for an output layer inside of the model
            names = {name: name if "lm_head" in name else of_norm(name.removeprefix("model.")) for name in tensors}
            tensors = {names[name]: tensor for name, tensor in tensors.items()}
        return tensors if engine == "speculators" else numbered(tensors), optional, ignored

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
            document |= {LAYERS: list(layers), "eagle_config": {LAYERS: numbers, USE_AUX: True}}
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
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        at, assumed = f"{path}/config.json", []
        layer_keys = fit(config.get(LAYER) or {}, dict[str, Any], f"{at}: {LAYER}")
        document = {**layer_keys, **{key: value for key, value in config.items() if key != LAYER}}
        state = {_own_name(name): tensor for name, tensor in state.items()}
        state = {name: tensor for name, tensor in state.items() if name not in COPIES}
        options = cls.options_of(document, state, at, assumed)
        return read_layer(document, path, tuple(FAMILIES)), options, state, assumed

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
        eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
        layers = named_layers(document, at)
        if not layers:
            assumed.append(f"{LAYERS} is not set: those after blocks 2, L/2 and L - 3 of the target are assumed")
        elif not document.get(LAYERS):
            assumed.append(
                f"{LAYERS} is in eagle_config alone, where SGLang and its trainers count blocks from 0: assumed are "
                f"the hidden states after blocks {', '.join(map(str, layers))}"
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
        width = fit(
            document.get("target_hidden_size") or document.get("hidden_size"), int, f"{at}: target_hidden_size"
        )
        if min(width, fit(rows, int, f"{at}: draft_vocab_size"), vocab) < 1:
            raise ValueError(
                f"{at}: target_hidden_size={width}, draft_vocab_size={rows}, vocab_size={vocab}; give 1 or more"
            )
        trained = fit(document.get(INIT) or {}, dict[str, Any], f"{at}: {INIT}").get("eagle3") or {}
        how = fit(trained, HeadOptions, f"{at}: {INIT}.eagle3")
        qwen = document.get("model_type") == "qwen3"
        sizes = {"layers": layers, "target_width": width, "draft_vocab": rows, "steps": how.steps, "decay": how.decay}
        return Eagle3Options(**sizes, **flags, qk_norm=qwen)


def numbered(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors, or their shapes, by the names that speculators gives them."""
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def of_norm(name: str) -> str:
    """A tensor's name, with the old name of a norm replaced."""
    for number, old in enumerate(OLD_NAMES):
        name = name.replace(old, f"fc_norm.{number}.")
    return name


def named_layers(document: Mapping[str, Any], at: str) -> tuple[int, ...]:
    """The hidden states that a config names, k for the one after k blocks; none if it leaves them open.

    Args:
        at: the file, for messages.
    """
    if top := document.get(LAYERS):
        return fit(top, tuple[int, ...], f"{at}: {LAYERS}")
    eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
    return tuple(k + 1 for k in fit(eagle.get(LAYERS) or (), tuple[int, ...], f"{at}: eagle_config.{LAYERS}"))


def _own_name(name: str) -> str:
    """A tensor's name in `Eagle3`; engines also read it with `model.` in front, and the layer with its number."""
    name = of_norm(name.removeprefix("model."))
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name
