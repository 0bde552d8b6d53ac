"""EAGLE-3 heads on disk: the layout of the original code, which SGLang and vLLM load, and that of speculators.

csdraft writes the first: config.json with the keys of both engines, and model.safetensors with the head alone, without
the embedding, which is the target's. `drafter.json` beside it says which target that was; engines do not read it.
Published heads leave things open: what is assumed of one is said in a warning when it is loaded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from csdraft.heads.eagle3 import Eagle3, HeadOptions, default_layers
from csdraft.heads.layers import embeddings, fingerprint
from csdraft.heads.self_draft import HEAD, read_document, write_document
from csdraft.heads.stored_head import StoredHead, check_tensors, read_tensors
from csdraft.heads.tied import Lender
from csdraft.stored import fit, shown

__all__ = ["SWITCHING", "Eagle3Head"]

EMBEDDING = "embed_tokens.weight"
LAYERS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS = "transformer_layer_config"
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary embedding that change with the length of a text."""
KEPT = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "attention_bias",
        "mlp_bias", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
        "transformers_version")  # fmt: skip
"""Keys of a layer's config that are written; of the others a `LlamaConfig` has defaults."""
OF_WEIGHTS = {"dtype", "torch_dtype", "quantization_config"}
"""Keys of how weights are stored; a head takes the target's dtype."""
OF_TRAINING = {"verifier_norm.weight", "verifier_lm_head.weight"}
"""Copies of the target's that speculators may leave in a folder."""


class Eagle3Head(StoredHead):
    """An EAGLE-3 head without its target.

    Args:
        config: of its layer.
        options: `layers` is empty where its config does not say which hidden states it reads: then those of the paper.
        state: its tensors by the names of `Eagle3`; the embedding only if it has its own.
        base: the target that it was trained for, if that is known.
    """

    what = "EAGLE-3 head"

    def __init__(
        self, config: LlamaConfig, options: HeadOptions, state: Mapping[str, Tensor], base: Lender | None = None
    ):
        super().__init__()
        self.config, self.options, self.base, self.names = config, options, base, tuple(state)
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in state.values())

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}

    # Binding.

    def check(self, target: Any) -> None:
        text = target.config.get_text_config(decoder=True)
        own = {"hidden_size": self.options.target_width, "vocab_size": self.config.vocab_size}
        for key, wanted in own.items():
            if (found := getattr(text, key)) != wanted:
                raise ValueError(
                    f"{self._name} was trained for a target with {key}={wanted}, {type(target).__name__} "
                    f"{getattr(target.config, '_name_or_path', '')!r} has {found}; decode with the head's own target"
                )
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
        if self.base is not None and (found := fingerprint(target)) != self.base.fingerprint:
            raise ValueError(
                f"{self._name} was trained on {self.base.name}, whose weights have fingerprint "
                f"{self.base.fingerprint}; the target {type(target).__name__} "
                f"{getattr(target.config, '_name_or_path', '')!r} has {found}. Decode with that target, or train a "
                "head for this one"
            )

    def open(self, target: Any, dtype: torch.dtype) -> Eagle3:
        self.check(target)
        made = self._made(target, dtype)
        if made.lent:
            made.embed_tokens.weight = nn.Parameter(made.embed_tokens.weight.to(dtype, copy=True), requires_grad=False)
        return made

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Eagle3:
        dtype = embeddings(target)["input.weight"].dtype
        made = self._made(target, dtype if dtype.is_floating_point else torch.float32)
        return made.requires_grad_(False).eval()

    def _made(self, target: Any, dtype: torch.dtype) -> Any:
        """The head on the target's device, with the target's own embedding unless it has one."""
        theirs = embeddings(target)["input.weight"]
        layers = self.options.layers or default_layers(target.config.get_text_config(decoder=True).num_hidden_layers)
        with torch.device("meta"):
            made: Any = Eagle3(self.config, replace(self.options, layers=layers))
        made.to_empty(device=theirs.device).to(dtype)
        made.rotary = made.new_rotary().to(theirs.device)
        made.d2t.zero_()
        for name, tensor in self.state.items():
            made.get_parameter(name).data.copy_(tensor) if name != "d2t" else made.d2t.copy_(tensor)
        if EMBEDDING not in self.names:
            made.embed_tokens.weight = nn.Parameter(theirs.detach(), requires_grad=False)
            made.lent = {EMBEDDING: "input.weight"}
        made.base, made.stored_by = self.base, Eagle3Head
        made.config._name_or_path = self.config._name_or_path
        return made

    # On disk.

    @classmethod
    def of(cls, head: Eagle3, state_dict: Mapping[str, Tensor] | None = None) -> Eagle3Head:
        """What is stored of a complete head.

        Args:
            state_dict: its weights, gathered, if its own parameters are not whole.
        """
        state = dict(head.state_dict() if state_dict is None else state_dict)
        state = {name: tensor for name, tensor in state.items() if name not in head.lent}
        if len(head.d2t) == head.config.vocab_size:
            del state["d2t"]
        config: Any = head.config
        return cls(config, head.options, state, head.base)

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.state.items()}
        if "d2t" in tensors:
            tensors["t2d"] = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            tensors["t2d"][tensors["d2t"] + torch.arange(len(tensors["d2t"]))] = True
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(self._document(), indent=2, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        write_document(folder, HEAD, {"base": asdict(self.base)} if self.base is not None else {})

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

    @staticmethod
    def refusals(config: Mapping[str, Any]) -> dict[str, str | None]:
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

    def _document(self) -> dict[str, Any]:
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
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        names = config.get("architectures") or ()
        named = any("eagle3" in str(name).lower() for name in names) if isinstance(names, list) else False
        return named or config.get("speculators_model_type") == "eagle3" or "draft_vocab_size" in config

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> Eagle3Head:
        at, assumed = f"{path}/config.json", []
        layer_keys = fit(config.get(SPECULATORS) or {}, dict[str, Any], f"{at}: {SPECULATORS}")
        document = {**layer_keys, **{key: value for key, value in config.items() if key != SPECULATORS}}
        state = {_own_name(name): tensor for name, tensor in read_tensors(path, **options).items()}
        state = {name: tensor for name, tensor in state.items() if name != "t2d" and name not in OF_TRAINING}
        described = _options(document, state, at, assumed)
        layer = _layer_config(document, at, assumed)
        layer.name_or_path = path
        with torch.device("meta"):
            whole = Eagle3(layer, replace(described, layers=described.layers or (0,) * _fused(described, state)))
        full = described.draft_vocab == layer.vocab_size
        check_tensors(path, state, whole, {EMBEDDING, "d2t"} if full else {EMBEDDING})
        _check_drafted(state, layer.vocab_size, path)
        if assumed:
            warnings.warn(f"{at}: {'; '.join(assumed)}", stacklevel=2)
        noted = (read_document(path, **options) or {}).get("base")
        base = None if noted is None else fit(noted, Lender, f"{path}/drafter.json: base")
        return cls(layer, described, state, base).eval()


def _own_name(name: str) -> str:
    """A tensor's name in `Eagle3`: engines also know it with `model.` in front, and the layer by its number."""
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _options(document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]) -> HeadOptions:
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
    return HeadOptions(
        fit(layers or (), tuple[int, ...], f"{at}: {LAYERS}"),
        width,
        rows,
        **flags,
    )


def _fused(options: HeadOptions, state: Mapping[str, Tensor]) -> int:
    """How many hidden states `fc` fuses."""
    return state["fc.weight"].shape[-1] // options.target_width if "fc.weight" in state else 3


def _layer_config(document: Mapping[str, Any], at: str, assumed: list[str]) -> LlamaConfig:
    """Of the layer: what a `LlamaConfig` knows of the document."""
    if document.get("model_type", "llama") != "llama":
        raise ValueError(f"{at}: model_type={document['model_type']!r}; csdraft reads heads with a llama layer")
    if (count := document.get("num_hidden_layers", 1)) != 1:
        assumed.append(f"num_hidden_layers={count} is the target's: an EAGLE-3 head has 1 layer")
    if quantised := document.get("quantization_config"):
        raise ValueError(f"{at}: quantization_config={shown(quantised)}; csdraft reads heads that are not quantised")
    known = {key: value for key, value in document.items() if key not in OF_WEIGHTS}
    try:
        config: Any = LlamaConfig.from_dict({**known, "num_hidden_layers": 1, "model_type": "llama"})
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{at} is no config of a Llama layer: {' '.join(str(error).split())}") from error
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{at}: hidden_act={shown(config.hidden_act)} is unknown; get the head's own config.json")
    if (kind := config.rope_parameters.get("rope_type", "default")) in SWITCHING:
        raise ValueError(f"{at}: rope_type={kind!r} changes with the length of a text, which csdraft's heads cannot")
    if document.get("logit_scale", 1.0) != 1.0:
        raise ValueError(f"{at}: logit_scale={document['logit_scale']!r}; csdraft reads heads without one")
    return config


def _check_drafted(state: Mapping[str, Tensor], vocab: int, path: str) -> None:
    """Raises ValueError if `d2t` leads out of the target's vocabulary, or twice to one token."""
    if "d2t" not in state:
        return
    ids = state["d2t"].long() + torch.arange(len(state["d2t"]))
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < len(ids):
        raise ValueError(
            f"{path!r}: d2t must hold offsets (target token - draft token) that lead to different tokens below "
            f"{vocab}; they lead to {int(ids.min())} to {int(ids.max())}, {len(ids.unique())} of {len(ids)} different"
        )
