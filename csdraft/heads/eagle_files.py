"""EAGLE-1 heads on disk: the layout of the original code, which vLLM and SGLang load; HASS has the same.

`fc` and `layers.0` lie in model.safetensors, without an output layer, which is the target's, and without the embedding
where that is the target's. The two engines do not take the same folders: vLLM wants `fc` without a bias and the
architecture LlamaForCausalLM, SGLang a bias and LlamaForCausalLMEagle. `bias` of the head's options decides which of
them can load it. Published heads leave things open: what is assumed of one is said in a warning when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.eagle import EagleOptions
from csdraft.heads.eagle3_files import EMBEDDING
from csdraft.heads.engines import ENGINES, ServedTarget, context_fault, target_faults, tensor_faults
from csdraft.heads.folder import INIT, Names, read_layer, read_tensors
from csdraft.heads.own_files import KIND, OwnHead, head_kinds
from csdraft.stored import fit, shown

__all__ = ["EagleHead"]

ORDINARY, OF_VLLM, OF_SGLANG = "LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle"
"""Architectures: of published heads as of every Llama model, of vLLM's class, of SGLang's."""
OUTPUT_LAYER = "lm_head.weight"


class EagleHead(OwnHead):
    """A head with EAGLE-1's module, without its target."""

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        named, trained = _architecture(config), config.get(INIT)
        if (isinstance(trained, Mapping) and trained.keys() & head_kinds().keys()) or named in (OF_VLLM, OF_SGLANG):
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

    methods = {"vllm": "eagle", "sglang": "EAGLE"}  # noqa: RUF012 - never written to

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """vLLM takes no bias of `fc`, SGLang wants one: zeros are left out, or put in."""
        document, tensors = self.document(), self.written()
        if engine == "vllm" and "fc.bias" in tensors and not tensors["fc.bias"].any():
            del tensors["fc.bias"]
        if engine == "sglang" and "fc.bias" not in tensors:
            tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])
        biased = "fc.bias" in tensors
        named = OF_SGLANG if engine == "sglang" else ORDINARY
        trained = {name: {**how, "bias": biased} for name, how in document[INIT].items()}
        return document | {"architectures": [named], "bias": biased, INIT: trained}, tensors

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        found = {engine: _reasons(engine, config, self.names) for engine in ENGINES}
        return {ENGINES[engine]: "; ".join(reasons) or None for engine, reasons in found.items()}

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        found = _reasons(engine, config, tensors)
        with torch.device("meta"):
            whole = self.network(None)
        wanted = {name: tuple(t.shape) for name, t in whole.state_dict().items() if name not in ("d2t", OUTPUT_LAYER)}
        here = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        bias = {"fc.bias": wanted["fc.weight"][:1]}  # whether there may be one is said above
        found += tensor_faults(here, wanted | bias, {EMBEDDING, *bias}, {OUTPUT_LAYER, "d2t", "t2d"})
        if target is not None:
            sizes = (fit(config.get(key), int, key) for key in ("hidden_size", "vocab_size"))
            found += target_faults(target, *sizes, layers=())
        if engine == "sglang":
            found += context_fault(config.get("max_position_embeddings"), target)
        return found


def _reasons(engine: str, config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Why an engine would not load a folder with this config.json and tensors of these names."""
    if engine == "speculators":
        return ["it has no EAGLE-1 heads that vLLM reads"]
    named, found = _architecture(config), []
    if "d2t" in names:
        found.append("it knows no draft vocabulary (d2t) of EAGLE-1 heads")
    if (count := config.get("num_hidden_layers", 1)) != 1:
        found.append(f"num_hidden_layers={shown(count)}, and it would make so many")
    biased = "fc.bias" in names or "model.fc.bias" in names
    if engine == "vllm" and biased:
        found.append("it takes no fc.bias: train with bias: false")
    if engine == "sglang" and not biased:
        found.append("fc.bias is missing, and it would be random: `csdraft export` adds zeros")
    if engine == "vllm" and named not in (ORDINARY, OF_VLLM):
        found.append(f"architectures={shown(config.get('architectures'))}, and it must be ['{ORDINARY}']")
    if engine == "sglang" and named != OF_SGLANG:
        found.append(f"architectures={shown(config.get('architectures'))}, and it must be ['{OF_SGLANG}']")
    return found


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
