"""EAGLE-1's original layout, which vLLM and SGLang load; HASS has the same.

model.safetensors holds `fc` and `layers.0`, without the output layer, which is the target's, and without an embedding
that is the target's. The two engines do not load the same folders: vLLM wants `fc` without a bias and the architecture
LlamaForCausalLM, SGLang a bias and LlamaForCausalLMEagle. The head's option `bias` decides which of them can load it.
Published heads leave things open: loading one warns of what it assumes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.engines import EMBEDDING, Found, ServedTarget
from csdraft.heads.folder import INIT, Names, read_layer
from csdraft.heads.formats._speculators import value_at
from csdraft.heads.formats.own import KIND, OwnHead, head_kinds
from csdraft.heads.kinds.eagle import EagleOptions
from csdraft.heads.self_draft import Lender
from csdraft.heads.stored_head import Parts
from csdraft.stored import fit, shown

__all__ = ["EagleHead"]

ORDINARY, OF_VLLM, OF_SGLANG = "LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle"
"""Architectures: that of every Llama model, and of most published heads; vLLM's class; SGLang's class."""
TAKEN = {"vllm": (ORDINARY, OF_VLLM), "sglang": (OF_SGLANG,)}
"""The architectures that an engine takes, the one that is written first."""
OUTPUT_LAYER = "lm_head.weight"
IGNORED = {"vllm": {"d2t"}, "sglang": {OUTPUT_LAYER, "d2t", "t2d"}}
"""Tensors that an engine does not read; `refusals` speaks of d2t. vLLM raises an error for any others."""


class EagleHead(OwnHead):
    """A head with EAGLE-1's module, without its target."""

    methods = {"vllm": "eagle", "sglang": "EAGLE"}  # noqa: RUF012 - never written to

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        if KIND in config:
            return False
        named, trained = value_at(config, "architectures[0]"), config.get(INIT)
        if (isinstance(trained, Mapping) and trained.keys() & head_kinds().keys()) or named in (OF_VLLM, OF_SGLANG):
            return True
        others = {"draft_vocab_size", "speculators_model_type"} & config.keys()
        if named not in (ORDINARY, None) or config.get("model_type", "llama") != "llama" or others:
            return False
        found = {name.removeprefix("model.") for name in names()}
        return "fc.weight" in found and not any("hidden_norm" in name for name in found)  # EAGLE-3 has a hidden_norm

    @classmethod
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        """Engines also read names with `model.` in front."""
        at, assumed, ignored = f"{path}/config.json", [], {"t2d"}
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if OUTPUT_LAYER in state and "d2t" not in state:
            assumed.append(f"{OUTPUT_LAYER} is not read: the output layer of an EAGLE-1 head is the target's")
            ignored.add(OUTPUT_LAYER)
        options = _options(config, state, at, assumed)
        if (count := config.get("num_hidden_layers", 1)) != 1:
            assumed.append(f"num_hidden_layers={shown(count)} is the target's: an EAGLE-1 head has 1 layer")
        fit(config.get("vocab_size"), int, f"{at}: vocab_size")
        layer = read_layer({key: value for key, value in config.items() if key not in (INIT, "bias")}, path)
        return layer, options, {name: tensor for name, tensor in state.items() if name not in ignored}, assumed

    def document(self) -> dict[str, Any]:
        document = super().document() | self.layer_document()
        trained = {document.pop(KIND): document.pop("options")}
        engine = "sglang" if self.options.bias else "vllm"
        named = {"architectures": [TAKEN[engine][0]], "num_hidden_layers": 1, "bias": self.options.bias}
        return document | named | {INIT: trained}

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Leaves out a bias of zeros for vLLM, which takes none, and adds one for SGLang, which wants one."""
        document, tensors = self.document(), self.written()
        if engine == "vllm" and "fc.bias" in tensors and not tensors["fc.bias"].any():
            del tensors["fc.bias"]
        if engine == "sglang" and "fc.bias" not in tensors:
            tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])
        biased, named = "fc.bias" in tensors, TAKEN.get(engine, TAKEN["vllm"])[0]
        trained = {name: {**how, "bias": biased} for name, how in document[INIT].items()}
        return document | {"architectures": [named], "bias": biased, INIT: trained}, tensors

    def refusals(self, engine: str, names: Collection[str]) -> Iterator[str]:
        biased = "fc.bias" in names or "model.fc.bias" in names
        if "d2t" in names:
            yield "it supports no draft vocabulary (d2t) in EAGLE-1 heads"
        if engine == "vllm" and biased:
            yield "it takes no fc.bias: train with bias: false"
        if engine == "sglang" and not biased:
            yield "fc.bias is missing, and it would be random: `csdraft export` adds zeros"
        if engine == "sglang" and EMBEDDING in names:
            yield f"{EMBEDDING}: it takes the target's embedding instead; use --to vllm"

    def places(self, engine: str, said: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        return {"num_hidden_layers": [1, None], "architectures[0]": TAKEN[engine]}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        wanted = {name: shape for name, shape in super().shapes().items() if name not in ("d2t", OUTPUT_LAYER)}
        return wanted | {"fc.bias": wanted["fc.weight"][:1]}  # `refusals` says whether there may be one

    def as_read(self, engine: str, tensors: Mapping[str, Tensor]) -> Found:
        """Engines put `model.` in front of the names themselves."""
        return tensors, {EMBEDDING, "fc.bias"}, IGNORED[engine]


def _options(config: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]) -> EagleOptions:
    """A head's options: how it was trained, if config.json says so, and whether its tensors have a bias."""
    trained = fit(config.get(INIT) or {"eagle": {}}, dict[str, Any], f"{at}: {INIT}")
    name = next(iter(trained))
    kind = head_kinds().get(name)
    if kind is None or not issubclass(kind.Options, EagleOptions) or len(trained) != 1:
        raise ValueError(f"{at}: {INIT}={shown(trained)} is not a head with EAGLE-1's module; pip install -U csdraft")
    said, found = fit(config.get("bias"), bool | None, f"{at}: bias"), "fc.bias" in state
    if said is None and INIT not in config and not found:
        assumed.append("bias is not set and there is no fc.bias: false is assumed")
    if said is False and found:
        assumed.append("bias is false, and there is a fc.bias: it is read")
    how = fit(trained[name], dict[str, Any], f"{at}: {INIT}.{name}") | {"bias": found or bool(said)}
    return fit(how, kind.Options, f"{at}: {INIT}.{name}")
