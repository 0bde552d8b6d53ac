"""EAGLE-1 heads on disk: the layout of the original code, which vLLM and SGLang load; HASS has the same.

`fc` and `layers.0` lie in model.safetensors, without an output layer, which is the target's, and without the embedding
where that is the target's. The two engines do not take the same folders: vLLM wants `fc` without a bias and the
architecture LlamaForCausalLM, SGLang a bias and LlamaForCausalLMEagle. `bias` of the head's options decides which of
them can load it. Published heads leave things open: what is assumed of one is said in a warning when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from csdraft.heads.eagle import EagleOptions
from csdraft.heads.eagle3_files import EMBEDDING
from csdraft.heads.own_files import KIND, OwnHead, head_kinds
from csdraft.heads.stored_head import Names, read_layer, read_tensors
from csdraft.stored import fit, shown

__all__ = ["EagleHead"]

INIT = "csdraft_init"
"""Key of config.json: how csdraft trained it, as `init` of a recipe says it. Others do not read it."""
ORDINARY, OF_VLLM, OF_SGLANG = "LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle"
"""Architectures: of published heads as of every Llama model, of vLLM's class, of SGLang's."""
OUTPUT_LAYER = "lm_head.weight"


class EagleHead(OwnHead):
    """A head with EAGLE-1's module, without its target."""

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        named = _architecture(config)
        if INIT in config or named in (OF_VLLM, OF_SGLANG):
            return True
        if named not in (ORDINARY, "") or config.get("model_type", "llama") != "llama" or KIND in config:
            return False
        found = {name.removeprefix("model.") for name in names()}
        return "fc.weight" in found and not any("hidden_norm" in name for name in found)  # which EAGLE-3 has

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> EagleHead:
        at, assumed = f"{path}/config.json", []
        state = _read(path, assumed, **options)
        described = _options(config, state, at, assumed)
        if (count := config.get("num_hidden_layers", 1)) != 1:
            assumed.append(f"num_hidden_layers={shown(count)} is the target's: an EAGLE-1 head has 1 layer")
        fit(config.get("vocab_size"), int, f"{at}: vocab_size")
        layer = read_layer({key: value for key, value in config.items() if key not in (INIT, "bias")}, at)
        layer.name_or_path = path
        made = cls.checked(path, layer, described, state, **options)
        if assumed:
            warnings.warn(f"{at}: {'; '.join(assumed)}", stacklevel=2)
        return made

    def document(self) -> dict[str, Any]:
        document, dtype = super().document(), self.state["fc.weight"].dtype
        trained = {document.pop(KIND): document.pop("options")}
        return document | {
            "architectures": [OF_SGLANG if self.options.bias else ORDINARY],
            "num_hidden_layers": 1,
            "bias": self.options.bias,
            "tie_word_embeddings": False,
            "rope_theta": self.config.rope_parameters["rope_theta"],  # where older engines look for it
            "dtype": str(dtype).removeprefix("torch."),
            INIT: trained,
        }

    def described(self) -> dict[str, str]:
        return super().described() | {"embedding": "its own" if EMBEDDING in self.names else "the target's"}

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        named, both = _architecture(config), []
        if "d2t" in self.names:
            both.append("it knows no draft vocabulary (d2t) of EAGLE-1 heads")
        if (count := config.get("num_hidden_layers", 1)) != 1:
            both.append(f"num_hidden_layers={shown(count)}, and it would make so many")
        vllm, sglang = list(both), list(both)
        if "fc.bias" in self.names:
            vllm.append("it takes no fc.bias")
        else:
            sglang.append("fc.bias is missing, and it would be random: add zeros, or train with bias: true")
        if named not in (ORDINARY, OF_VLLM):
            vllm.append(f"architectures must be ['{ORDINARY}']")
        if named != OF_SGLANG:
            sglang.append(f"architectures must be ['{OF_SGLANG}']")
        return {"vLLM": "; ".join(vllm) or None, "SGLang": "; ".join(sglang) or None}


def _architecture(config: Mapping[str, Any]) -> str:
    """The first that config.json names; '' if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _read(path: str, assumed: list[str], **options: Any) -> dict[str, Tensor]:
    """The tensors of a folder by their names in `Eagle`: engines also know them with `model.` in front."""
    state = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path, **options).items()}
    computed = {name for name in state if name == "t2d" or name.endswith("rotary_emb.inv_freq")}
    if OUTPUT_LAYER in state and "d2t" not in state:
        assumed.append(f"{OUTPUT_LAYER} is not read: the output layer of an EAGLE-1 head is the target's")
        computed.add(OUTPUT_LAYER)
    return {name: tensor for name, tensor in state.items() if name not in computed}


def _options(config: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]) -> EagleOptions:
    """How it was trained, if config.json says so, and what its tensors say where that is open."""
    trained = fit(config.get(INIT) or {"eagle": {}}, dict[str, Any], f"{at}: {INIT}")
    name = next(iter(trained))
    kind = head_kinds().get(name)
    if kind is None or not issubclass(kind.Options, EagleOptions) or len(trained) != 1:
        raise ValueError(f"{at}: {INIT}={shown(trained)} is no head with EAGLE-1's module; pip install -U csdraft")
    said, found = fit(config.get("bias"), bool | None, f"{at}: bias"), "fc.bias" in state
    if said is None and INIT not in config and not found:
        assumed.append("bias is open and there is no fc.bias: taken is false")
    if said is False and found:
        assumed.append("bias is false, and there is a fc.bias: it is read")
    how = fit(trained[name], dict[str, Any], f"{at}: {INIT}.{name}") | {"bias": found or bool(said)}
    return fit(how, kind.Options, f"{at}: {INIT}.{name}")
