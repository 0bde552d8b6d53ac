"""What serving engines want of a folder with an EAGLE-3 head: all that they would refuse, or take for another head.

For a missing or unknown tensor vLLM raises an error. SGLang and the package speculators use random numbers, or ignore
it. All of these count as refused here.

Engines number the target's hidden states in two ways. At the top level of config.json, which vLLM and speculators
read, k is the state after k blocks. In `eagle_config`, which SGLang reads, the same state is k - 1, the number of the
block that computes it. So a folder for both has different numbers in the two places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from csdraft.heads.engines import ServedTarget, context_fault, target_faults, tensor_faults
from csdraft.heads.folder import BROKEN_CONFIG, QWEN, check_drafted
from csdraft.heads.formats._speculators import LAYER, MODEL_TYPE, PLANS, VERSION, layout_faults, plan, t2d_fault
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options
from csdraft.stored import fit, shown

__all__ = [
    "FAMILIES", "LAYERS", "NORMS", "OLD_FLAG", "eagle3_faults", "named_layers", "of_norm", "speculators_document",
]  # fmt: skip

LAYERS = "eagle_aux_hidden_state_layer_ids"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
OLD_FLAG, OLD_NAMES = "use_aux_norm", ("aux_norm_low.", "aux_norm_mid.", "aux_norm_high.")
"""What `fc_norm` and its three norms were once called; SGLang reads them still."""
FAMILIES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
"""Families of the layer -> the architecture that is written. Qwen 3 norms queries and keys."""
TAKEN = {
    ("vllm", "llama"): (FAMILIES["llama"], "Eagle3LlamaForCausalLM"),
    ("vllm", "qwen3"): (FAMILIES["qwen3"],),
    ("sglang", "llama"): (FAMILIES["llama"],),
}
"""Engine and family -> the architectures that it takes in the original layout."""
OF_HEAD = ("draft_vocab_size", "target_hidden_size", *NORMS, LAYERS)
"""Keys that are outside `transformer_layer_config`."""
NOT_OF_LAYER = (*OF_HEAD, "eagle_config", "architectures", "rope_theta", "dtype", "transformers_version")
OF_LAYER = {"num_hidden_layers": 1, "hidden_act": "silu"}
"""Keys of the layer and their only value; the last one may be missing."""
NOT_OF_SGLANG = ("attention_bias", "mlp_bias", "bias", "tie_word_embeddings", "norm_before_residual")
"""Flags that SGLang ignores in such a head."""
MOST_STATES = 1000
"""Hidden states that a config may ask for."""


def of_norm(name: str) -> str:
    """A tensor's name, with the old name of a norm replaced."""
    for number, old in enumerate(OLD_NAMES):
        name = name.replace(old, f"fc_norm.{number}.")
    return name


def named_layers(document: Mapping[str, Any], at: str = "config.json") -> tuple[int, ...]:
    """The hidden states that a config names, k for the one after k blocks; none if it leaves them open.

    Args:
        at: the file, for messages.
    """
    if top := document.get(LAYERS):
        return fit(top, tuple[int, ...], f"{at}: {LAYERS}")
    eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
    return tuple(k + 1 for k in fit(eagle.get(LAYERS) or (), tuple[int, ...], f"{at}: eagle_config.{LAYERS}"))


def speculators_document(document: Mapping[str, Any], target: ServedTarget, tokens: int) -> dict[str, Any]:
    """config.json in the layout of speculators, made from that in the original layout.

    Args:
        target: its name is written, because speculators and vLLM load it.
        tokens: how many are drafted per round.
    """
    return {key: document[key] for key in OF_HEAD} | {
        "architectures": ["Eagle3DraftModel"],
        "dtype": document["dtype"],
        "embed_requires_grad": False,
        PLANS: plan("eagle3", target.name, target.architectures, tokens),
        MODEL_TYPE: "eagle3",
        "speculators_version": VERSION,
        "tie_word_embeddings": False,
        # It keeps num_aux_hidden_states, without which vLLM takes 3 hidden states.
        LAYER: {key: value for key, value in document.items() if key not in NOT_OF_LAYER},
    }


@dataclass(frozen=True)
class Seen:
    """A folder as one engine reads it."""

    engine: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    target: ServedTarget | None

    @property
    def nested(self) -> bool:
        """Whether it has the layout of speculators, with the layer's keys in a document of their own."""
        return LAYER in self.config or MODEL_TYPE in self.config

    @property
    def layer(self) -> Mapping[str, Any]:
        """The keys of its layer."""
        return fit(self.config.get(LAYER), dict[str, Any], LAYER) if self.nested else self.config

    @property
    def family(self) -> Any:
        """What its layer is called by transformers."""
        return self.layer.get("model_type", "llama")

    @property
    def eagle(self) -> Mapping[str, Any]:
        return fit(self.config.get("eagle_config") or {}, dict[str, Any], "eagle_config")

    def _value(self, key: str) -> Any:
        found = self.config.get(key)
        return self.layer.get(key) if found is None else found

    def number(self, key: str, default: int | None = None) -> int:
        found = self._value(key)
        found = default if found is None else found
        if found is None:
            raise ValueError(f"{key} is missing")
        return fit(found, int, key)

    def flag(self, key: str) -> bool:
        return fit(self._value(key) or False, bool, key)

    @property
    def count(self) -> int:
        """How many hidden states the engine fuses."""
        if self.engine == "speculators":
            return len(self.config.get(LAYERS) or (0, 0, 0))
        if (named := self.layer.get("num_aux_hidden_states")) is not None:
            return fit(named, int, "num_aux_hidden_states")
        return len(self.eagle.get(LAYERS) or (0, 0, 0))

    @property
    def width(self) -> int:
        return self.number("hidden_size")

    @property
    def target_width(self) -> int:
        return self.number("target_hidden_size", self.width)

    @property
    def rows(self) -> int:
        """How many tokens the output layer has."""
        return self.number("draft_vocab_size", self.number("vocab_size"))


def eagle3_faults(
    engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
) -> list[str]:
    """Why an engine would not load a folder with an EAGLE-3 head, or would take it for another head.

    Args:
        engine: a key of `ENGINES`.
        config, tensors: of the folder.
        target: the model that it is to draft for; without it, sizes are not compared.
    """
    seen = Seen(engine, config, tensors, target)
    if seen.nested and engine == "sglang":
        return [f"{LAYER}: it reads no folders of speculators; export with --to sglang"]
    if not seen.nested and engine == "speculators":
        return [f"{LAYER} is missing: the folder has another layout; export with --to speculators"]
    found: list[str] = []
    for rule in (_speculators if seen.nested else _original, _layer, _head, _sglang, _hidden_states, _tensors):
        try:
            found += rule(seen)
        except ValueError as error:  # a key is missing or of another type
            found.append(str(error))
    if engine == "speculators" and not found:  # vLLM reads the same folder
        found = [f"vLLM: {fault}" for fault in eagle3_faults("vllm", config, tensors, target)]
    return list(dict.fromkeys(found))


def _original(seen: Seen) -> Iterator[str]:
    """Keys of the original layout."""
    names, family = fit(seen.config.get("architectures") or [], list[str], "architectures"), seen.family
    taken = TAKEN.get((seen.engine, family), ())
    # vLLM takes its first architecture, and puts Eagle3 in front of other names.
    first = [name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}" for name in names[:1]]
    if taken and (names if seen.engine == "sglang" else first) not in [[name] for name in taken]:
        yield f"architectures={names} is not [{taken[0]!r}], with model_type={family!r}"
    before = seen.eagle.get("norm_before_fc")
    if before is not None and before != seen.flag("norm_before_fc"):
        yield f"norm_before_fc={before} in eagle_config, which it follows, and {seen.flag('norm_before_fc')} outside"
    if seen.eagle.get("use_aux_hidden_state", True) is not True:
        yield f"eagle_config.use_aux_hidden_state={seen.eagle['use_aux_hidden_state']}: it would fuse no hidden states"


def _speculators(seen: Seen) -> Iterator[str]:
    """Keys of the layout of speculators. vLLM refuses a folder without one, or the engines' defaults differ."""
    yield from layout_faults("eagle3", seen.engine, seen.config)
    if "norm_before_residual" not in seen.config:
        yield "norm_before_residual is missing: vLLM takes true, speculators false"
    if seen.engine != "speculators":
        return
    if seen.flag("norm_before_fc") and seen.flag("fc_norm"):
        yield "norm_before_fc and fc_norm are both true, and it takes one of them; use vLLM's layout (--to vllm)"
    if seen.target_width != seen.width:
        yield (
            f"target_hidden_size={seen.target_width} is not hidden_size={seen.width}, which it takes for both; use "
            "vLLM's layout (--to vllm)"
        )


def _layer(seen: Seen) -> Iterator[str]:
    """Keys of its decoder layer."""
    layer, families = seen.layer, [family for family in FAMILIES if seen.engine != "sglang" or family == "llama"]
    if "model_type" not in layer:
        yield "model_type is missing; write 'llama'"
    elif seen.family not in families:
        yield f"model_type={shown(layer['model_type'])} is not {' or '.join(map(repr, families))}"
    for key, wanted in OF_LAYER.items():
        if key not in layer and key != "hidden_act":
            yield f"{key} is missing; write {wanted!r}"
        elif layer.get(key, wanted) != wanted:
            yield f"{key}={layer[key]!r} is not {wanted!r}, which it has in every EAGLE-3 head"
    if quantised := layer.get("quantization_config"):
        yield f"quantization_config={shown(quantised)}; export weights that are not quantised"
    rotary = fit(layer.get("rope_parameters") or {}, dict[str, Any], "rope_parameters")
    if "rope_theta" in layer and rotary.get("rope_theta", layer["rope_theta"]) != layer["rope_theta"]:
        yield f"rope_theta={layer['rope_theta']}, and {rotary['rope_theta']} in rope_parameters"


def _head(seen: Seen) -> Iterator[str]:
    """Keys of the head around its layer."""
    vocab = seen.number("vocab_size")
    if not 0 < seen.rows <= vocab:
        yield f"draft_vocab_size={seen.rows} is not from 1 to vocab_size={vocab}"
    if "embed_tokens.weight" not in seen.tensors and seen.target_width != seen.width:
        yield f"embed_tokens.weight is missing: the target's has width {seen.target_width}, the head {seen.width}"
    if seen.target is not None:
        yield from target_faults(seen.target, seen.target_width, vocab, named_layers(seen.config))


def _sglang(seen: Seen) -> Iterator[str]:
    """What SGLang cannot do, or ignores."""
    if seen.engine != "sglang":
        return
    for key in NOT_OF_SGLANG:
        if seen.flag(key):
            yield f"{key} is true, which it does not know in such a head; use vLLM"
    if seen.config.get("logit_scale", 1.0) != 1.0:
        yield f"logit_scale={seen.config['logit_scale']}, which it does not know; use vLLM"
    if seen.config.get("draft_vocab_size") is None:
        yield "draft_vocab_size is missing: it would take the target's output layer; write the number of tokens"
    if seen.count * seen.target_width == seen.width:
        yield (
            f"num_aux_hidden_states={seen.count} of target_hidden_size={seen.target_width} are as wide as hidden_size="
            f"{seen.width}, and then it leaves fc out; use vLLM, or fuse more hidden states"
        )
    if "embed_tokens.weight" in seen.tensors and seen.target_width == seen.width:
        yield "embed_tokens.weight: it takes the target's embedding instead; use vLLM"
    yield from context_fault(seen.layer.get("max_position_embeddings"), seen.target)


def _hidden_states(seen: Seen) -> Iterator[str]:
    """Which hidden states it fuses."""
    layers, top, inner = named_layers(seen.config), seen.config.get(LAYERS), seen.eagle.get(LAYERS)
    blocks = [k - 1 for k in layers]
    if layers and seen.count != len(layers):
        yield f"num_aux_hidden_states is {seen.count} to it, and {LAYERS} names {len(layers)}"
    if seen.engine == "sglang" and top and inner != blocks:
        yield (
            f"eagle_config.{LAYERS}={inner}, where it numbers blocks from 0: for the hidden states after blocks "
            f"{list(layers)} write {blocks}"
        )
    if seen.engine != "sglang" and inner and not top:
        yield (
            f"{LAYERS} is missing at the top level; it would take the numbers of eagle_config, which count from 0, for"
            f" numbers from 1: write {list(layers)} at the top"
        )
    if list(layers) != sorted(set(layers)) or (layers and layers[0] < 0):
        yield f"{LAYERS}={list(layers)} must rise from 0: engines hand hidden states over in the target's order"


def _tensors(seen: Seen) -> Iterator[str]:
    """Names, shapes and types of its tensors."""
    names, wanted, vocab = _renamed(seen), _wanted(seen), seen.number("vocab_size")
    # Without an embedding speculators means to load the target's, but uses uninitialised memory.
    optional = set() if seen.engine == "speculators" else {"embed_tokens.weight"}
    yield from tensor_faults(names, wanted, optional, {"t2d"})
    if "d2t" in wanted and "d2t" in names and names["d2t"].dtype == torch.int64:
        check_drafted(names, vocab, "the folder")
        if seen.engine == "speculators" and names["d2t"].shape == wanted["d2t"]:
            yield from t2d_fault(names, vocab)


def _renamed(seen: Seen) -> dict[str, Tensor]:
    """The tensors by the names that the engine gives them."""
    if seen.engine == "speculators":
        return dict(seen.tensors)
    names = {name: name.replace("midlayer.", "layers.0.") for name in seen.tensors}
    if seen.engine == "sglang":  # which does not look for an output layer inside of the model
        names = {name: of_norm(new) for name, new in names.items()}
        names = {name: new if "lm_head" in new else new.removeprefix("model.") for name, new in names.items()}
    return {names[name]: tensor for name, tensor in seen.tensors.items()}


def _wanted(seen: Seen) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the engine reads: those of an `Eagle3` of this config."""
    if seen.count > MOST_STATES:
        raise ValueError(f"num_aux_hidden_states={seen.count} is more than {MOST_STATES}")
    heads = seen.number("num_attention_heads")
    sizes: dict[str, Any] = {key: seen.number(key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": seen.number("num_key_value_heads", heads)}
    qwen = seen.family == "qwen3"
    sizes |= {"head_dim": seen.number("head_dim", QWEN["head_dim"] if qwen else seen.width // max(heads, 1))}
    sizes |= {key: seen.flag(key) for key in ("attention_bias", "mlp_bias")}
    norms: dict[str, Any] = {key: seen.flag(key) for key in NORMS}
    norms["fc_norm"] |= seen.engine == "sglang" and seen.flag(OLD_FLAG)
    layers = (0,) * seen.count
    options = Eagle3Options(seen.rows, layers=layers, target_width=seen.target_width, **norms, qk_norm=qwen)
    try:
        with torch.device("meta"):
            head = Eagle3(LlamaConfig(**sizes), options)
    except BROKEN_CONFIG as error:
        raise ValueError(f"no EAGLE-3 head has the sizes of its config.json: {error}") from error
    wanted = {name.replace("midlayer.", "layers.0."): tuple(t.shape) for name, t in head.state_dict().items()}
    if seen.rows == sizes["vocab_size"]:
        del wanted["d2t"]
    return wanted
