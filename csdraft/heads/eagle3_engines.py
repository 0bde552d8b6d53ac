"""What serving engines ask of a folder with an EAGLE-3 head: all that they would refuse, or take for another head.

For a missing or unknown tensor vLLM raises an error; SGLang and the package speculators draw random numbers, or ignore
it. All of that counts as refused here.

Engines number the target's hidden states in two ways. At the top level of config.json, where vLLM and speculators
look, k is the state after k blocks. In `eagle_config`, where SGLang looks, the same state is k - 1, the number of the
block that computes it. A folder for both has different numbers in the two places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.engines import ServedTarget, context_fault, target_faults, tensor_faults
from csdraft.heads.folder import check_drafted
from csdraft.stored import fit, shown

__all__ = ["LAYERS", "NORMS", "SPECULATORS", "eagle3_faults", "named_layers", "speculators_document"]

LAYERS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = "transformer_layer_config"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
ARCHITECTURE = "LlamaForCausalLMEagle3"
OF_VLLM = (ARCHITECTURE, "Eagle3LlamaForCausalLM")
OF_HEAD = ("draft_vocab_size", "target_hidden_size", *NORMS, LAYERS)
"""Keys that stand outside of `transformer_layer_config`."""
NOT_OF_LAYER = (*OF_HEAD, "eagle_config", "architectures", "rope_theta", "dtype", "transformers_version")
VERSION = "0.9.0"
"""Of speculators, whose layout is written."""


def named_layers(document: Mapping[str, Any], at: str = "config.json") -> tuple[int, ...]:
    """The hidden states that a config names, k for the one after k blocks; none if it leaves them open.

    Args:
        at: the file, which messages name.
    """
    if top := document.get(LAYERS):
        return fit(top, tuple[int, ...], f"{at}: {LAYERS}")
    eagle = fit(document.get("eagle_config") or {}, dict[str, Any], f"{at}: eagle_config")
    return tuple(k + 1 for k in fit(eagle.get(LAYERS) or (), tuple[int, ...], f"{at}: eagle_config.{LAYERS}"))


def speculators_document(document: Mapping[str, Any], target: ServedTarget, tokens: int) -> dict[str, Any]:
    """config.json of the speculators format, from that of the original layout.

    Args:
        target: named in it, as speculators and vLLM load it.
        tokens: drafted a round.
    """
    layer = {key: value for key, value in document.items() if key not in NOT_OF_LAYER}
    proposal = {"proposal_type": "greedy", "speculative_tokens": tokens}
    return {key: document[key] for key in OF_HEAD} | {
        "architectures": ["Eagle3DraftModel"],
        "dtype": document["dtype"],
        "embed_requires_grad": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"architectures": list(target.architectures), "name_or_path": target.name},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "tie_word_embeddings": False,
        SPECULATORS: layer,  # vLLM takes 3 hidden states unless num_aux_hidden_states is there
    }


@dataclass(frozen=True)
class Seen:
    """A folder as one engine sees it."""

    engine: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    target: ServedTarget | None

    @property
    def in_parts(self) -> bool:
        """Whether it has the layout of speculators."""
        return SPECULATORS in self.config or "speculators_model_type" in self.config

    @property
    def layer(self) -> Mapping[str, Any]:
        """The keys of its layer."""
        return fit(self.config.get(SPECULATORS), dict[str, Any], SPECULATORS) if self.in_parts else self.config

    @property
    def eagle(self) -> Mapping[str, Any]:
        return fit(self.config.get("eagle_config") or {}, dict[str, Any], "eagle_config")

    def number(self, key: str, default: int | None = None) -> int:
        found = self.config.get(key)
        found = self.layer.get(key) if found is None else found
        if found is None and default is not None:
            return default
        if found is None:
            raise ValueError(f"{key} is missing")
        return fit(found, int, key)

    def flag(self, key: str) -> bool:
        found = self.config.get(key)
        return fit((self.layer.get(key) if found is None else found) or False, bool, key)

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
        """Of its output layer."""
        return self.number("draft_vocab_size", self.number("vocab_size"))


def eagle3_faults(
    engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
) -> list[str]:
    """Why an engine would not load a folder with an EAGLE-3 head, or would take it for another head.

    Args:
        engine: a key of `ENGINES`.
        config, tensors: of the folder.
        target: what it is to draft for; without it its sizes are not compared.
    """
    seen = Seen(engine, config, tensors, target)
    if seen.in_parts and engine == "sglang":
        return [f"{SPECULATORS}: it reads no folders of speculators; export with --to sglang"]
    if not seen.in_parts and engine == "speculators":
        return [f"{SPECULATORS} is missing: the folder has another layout; export with --to speculators"]
    found: list[str] = []
    for rule in (_speculators if seen.in_parts else _original, _layer, _head, _sglang, _hidden_states, _tensors):
        try:
            found += rule(seen)
        except ValueError as error:  # a key of another type
            found.append(str(error))
    if engine == "speculators" and not found:  # vLLM reads the same folder
        found = [f"vLLM: {fault}" for fault in eagle3_faults("vllm", config, tensors, target)]
    return list(dict.fromkeys(found))


def _original(seen: Seen) -> Iterator[str]:
    """Keys of the layout of the original code."""
    names = fit(seen.config.get("architectures") or [], list[str], "architectures")
    taken = [name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}" for name in names]
    if seen.engine == "sglang" and names != [ARCHITECTURE]:
        yield f"architectures={names} is not [{ARCHITECTURE!r}]"
    if seen.engine == "vllm" and (not taken or taken[0] not in OF_VLLM):
        yield f"architectures={names} is not [{ARCHITECTURE!r}]"
    before = seen.eagle.get("norm_before_fc")
    if before is not None and before != seen.flag("norm_before_fc"):
        yield f"norm_before_fc={before} in eagle_config, which it follows, and {seen.flag('norm_before_fc')} outside"
    if seen.eagle.get("use_aux_hidden_state", True) is not True:
        yield f"eagle_config.use_aux_hidden_state={seen.eagle['use_aux_hidden_state']}: it would fuse no hidden states"


def _speculators(seen: Seen) -> Iterator[str]:
    """Keys of the layout of speculators. What is missing is an error in vLLM, or open to two readings."""
    if (kind := seen.config.get("speculators_model_type")) != "eagle3":
        yield f"speculators_model_type={kind!r} is not 'eagle3'"
    said = fit(seen.config.get("speculators_config") or {}, dict[str, Any], "speculators_config")
    methods = fit(said.get("proposal_methods") or [], list[dict[str, Any]], "proposal_methods") or [{}]
    verifier = fit(said.get("verifier") or {}, dict[str, Any], "speculators_config.verifier")
    needed = {
        "speculators_config.proposal_methods[0].speculative_tokens": methods[0].get("speculative_tokens"),
        "speculators_config.verifier.name_or_path": verifier.get("name_or_path"),
    }
    yield from (f"{key} is missing" for key, value in needed.items() if value is None)
    if "norm_before_residual" not in seen.config:
        yield "norm_before_residual is missing: vLLM takes true, speculators false"
    if seen.engine == "speculators":
        yield from _of_package(seen, said, methods[0], verifier)


def _of_package(seen: Seen, said: Any, method: Any, verifier: Any) -> Iterator[str]:
    """What the package asks beyond vLLM."""
    fixed = {
        "speculators_config.algorithm": (said.get("algorithm"), "eagle3"),
        "speculators_config.default_proposal_method": (said.get("default_proposal_method"), "greedy"),
        "speculators_config.proposal_methods[0].proposal_type": (method.get("proposal_type"), "greedy"),
    }
    yield from (f"{key}={found!r} is not {wanted!r}" for key, (found, wanted) in fixed.items() if found != wanted)
    if not isinstance(verifier.get("architectures"), list):
        yield "speculators_config.verifier.architectures is missing"
    if "draft_vocab_size" not in seen.config:
        yield "draft_vocab_size is missing: it takes 32000"
    if seen.flag("norm_before_fc") and seen.flag("fc_norm"):
        yield "norm_before_fc and fc_norm are both true, and it takes one of them; use vLLM's layout (--to vllm)"
    if seen.target_width != seen.width:
        yield (
            f"target_hidden_size={seen.target_width} is not hidden_size={seen.width}, which it takes for both; use "
            "vLLM's layout (--to vllm)"
        )


def _layer(seen: Seen) -> Iterator[str]:
    """Keys of its decoder layer."""
    layer = seen.layer
    for key, wanted in {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu"}.items():
        if key not in layer and key != "hidden_act":
            yield f"{key} is missing; write {wanted!r}"
        elif layer.get(key, wanted) != wanted:
            yield f"{key}={layer[key]!r} is not {wanted!r}, which it has in every EAGLE-3 head of a Llama layer"
    if quantised := layer.get("quantization_config"):
        yield f"quantization_config={shown(quantised)}; export weights that are not quantised"
    rotary = fit(layer.get("rope_parameters") or {}, dict[str, Any], "rope_parameters")
    if "rope_theta" in layer and rotary.get("rope_theta", layer["rope_theta"]) != layer["rope_theta"]:
        yield f"rope_theta={layer['rope_theta']}, and {rotary['rope_theta']} in rope_parameters"


def _head(seen: Seen) -> Iterator[str]:
    """Keys of what surrounds the layer."""
    vocab = seen.number("vocab_size")
    if not 0 < seen.rows <= vocab:
        yield f"draft_vocab_size={seen.rows} is not from 1 to vocab_size={vocab}"
    if "embed_tokens.weight" not in seen.tensors and seen.target_width != seen.width:
        yield f"embed_tokens.weight is missing: the target's has width {seen.target_width}, the head {seen.width}"
    if seen.target is not None:
        yield from target_faults(seen.target, seen.target_width, vocab, named_layers(seen.config))


def _sglang(seen: Seen) -> Iterator[str]:
    """What SGLang cannot do, or does not look at."""
    if seen.engine != "sglang":
        return
    for key in ("attention_bias", "mlp_bias", "bias", "tie_word_embeddings", "norm_before_residual"):
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
    layers, top = named_layers(seen.config), seen.config.get(LAYERS)
    inner = seen.eagle.get(LAYERS)
    if layers and seen.count != len(layers):
        yield f"num_aux_hidden_states is {seen.count} to it, and {LAYERS} names {len(layers)}"
    if seen.engine == "sglang" and top and inner != [k - 1 for k in layers]:
        yield (
            f"eagle_config.{LAYERS}={inner}, where it numbers blocks from 0: for the hidden states after blocks "
            f"{list(layers)} write {[k - 1 for k in layers]}"
        )
    if seen.engine != "sglang" and inner and not top:
        yield (
            f"{LAYERS} is missing at the top level; it would take the numbers of eagle_config, which count from 0, for"
            f" numbers from 1: write {list(layers)} at the top"
        )
    if len(set(layers)) < len(layers) or list(layers) != sorted(layers) or (layers and layers[0] < 0):
        yield f"{LAYERS}={list(layers)} must rise from 0: engines hand hidden states over in the target's order"


def _tensors(seen: Seen) -> Iterator[str]:
    """Names, shapes and types of its tensors."""
    names = _as_taken(seen)
    wanted, vocab = _wanted(seen), seen.number("vocab_size")
    # speculators means to load a missing embedding from the target, and takes what lies in memory for it.
    optional = set() if seen.engine == "speculators" else {"embed_tokens.weight"}
    yield from tensor_faults(names, wanted, optional, {"t2d"})
    if "d2t" in wanted and "d2t" in names and names["d2t"].dtype == torch.int64:
        check_drafted(names, vocab, "the folder")
        if seen.engine == "speculators" and names["d2t"].shape == wanted["d2t"]:
            drafted, t2d = names["d2t"] + torch.arange(seen.rows), names.get("t2d")
            if t2d is None or t2d.shape != (vocab,) or t2d.nonzero()[:, 0].tolist() != drafted.sort().values.tolist():
                yield f"t2d must be true for the {seen.rows} tokens of d2t, of {vocab}"


def _as_taken(seen: Seen) -> dict[str, Tensor]:
    """The tensors by the names that the engine gives them."""
    if seen.engine == "speculators":
        return dict(seen.tensors)
    names = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in seen.tensors.items()}
    if seen.engine == "sglang":
        return {name.removeprefix("model."): tensor for name, tensor in names.items()}
    return names


def _wanted(seen: Seen) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the engine reads."""
    width, inner, vocab = seen.width, seen.number("intermediate_size"), seen.number("vocab_size")
    heads = seen.number("num_attention_heads")
    size = seen.number("head_dim", width // max(heads, 1))
    keys = seen.number("num_key_value_heads", heads) * size
    fused = seen.count * seen.target_width
    projections = {
        "self_attn.q_proj": (heads * size, 2 * width), "self_attn.k_proj": (keys, 2 * width),
        "self_attn.v_proj": (keys, 2 * width), "self_attn.o_proj": (width, heads * size),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
    wanted: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, width),
        "fc.weight": (width, fused),
        "norm.weight": (width,),
        "lm_head.weight": (seen.rows, width),
    }
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        wanted[f"layers.0.{name}.weight"] = (width,)
    for name, shape in projections.items():
        wanted[f"layers.0.{name}.weight"] = shape
        if seen.flag("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
            wanted[f"layers.0.{name}.bias"] = shape[:1]
    if seen.flag("norm_before_fc"):
        wanted["input_norm.weight"] = (fused,)
    if seen.flag("fc_norm"):
        norms = range(min(seen.count, len(seen.tensors) + 1))  # a config may say any number
        wanted |= {f"fc_norm.{i}.weight": (seen.target_width,) for i in norms}
    if seen.rows != vocab:
        wanted["d2t"] = (seen.rows,)
    return wanted
