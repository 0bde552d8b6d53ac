"""Models from folders and the Hub: whole ones, adapters on their base, and drafters that use a target's modules.

Files may come from strangers. Their code runs only if the caller allows it, and nothing is asked on the terminal.
Missing weights raise an error, where transformers would fill in random numbers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from csdraft.checks.refusals import refusal
from csdraft.decoding.call import Call
from csdraft.decoding.names import name_of
from csdraft.decoding.traits import unwrapped
from csdraft.heads.folder import check_place
from csdraft.heads.kinds.kangaroo import KangarooDraft
from csdraft.heads.kinds.mtp import OWN
from csdraft.heads.layers import first_layer
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import (
    KANGAROO,
    MTP,
    SELF_DRAFT,
    TIED,
    SelfDraft,
    put_adapter,
    read_adapter,
    read_document,
)
from csdraft.heads.stored_head import head_at
from csdraft.heads.tied import TiedDraft
from csdraft.stored import check_config, is_hub_id, kind_of, read_object, shown

__all__ = ["HUB_OPTIONS", "MOST_VOCABULARY_PADDING", "base_model", "check_reviewer", "given_model", "load_model"]

HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
LAYERS = ("num_hidden_layers", "num_decoder_layers")
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Keys of a config.json that say how large a model is."""
PACKED = 16
"""The most numbers that one number of quantised weights may hold."""
MOST_VOCABULARY_PADDING = 1024
"""The most tokens by which the vocabularies of a drafter and its target may differ."""
SOME = 4
"""Names of weights that a message lists."""


def load_model(path: str, local_base: bool = True, **options: Any) -> nn.Module:
    """Loads a model from a folder or Hub id, or an adapter (a PEFT folder) with its base.

    A self-drafting adapter, a student that is tied to its target, or a head is incomplete: it is returned as an
    `OnTarget`, which has to be bound to a target.

    Args:
        path: folder or Hub id; "mtp" is the target's own next-token module.
        local_base: whether an adapter's base may be a path of this machine; otherwise it must be a Hub id.
        options: of `from_pretrained`: dtype, device_map, revision, ...; trust_remote_code is False by default.

    Raises:
        ValueError: weights are missing, of another shape or cut short; the message names the folder and the first few.
    """
    from transformers.utils import find_adapter_config_file

    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    if path == MTP and not Path(path).exists():
        return OWN
    check_place(path)
    adapter, document = find_adapter_config_file(path, **hub), read_document(path, **hub) or {}
    kind = document.get("kind")
    if kind == MTP:
        return OWN
    if kind == TIED:
        return TiedDraft.load(path, document, options.get("dtype"), **hub)
    if kind == KANGAROO:
        return KangarooDraft.load(path, document, **hub)
    if adapter is None:
        return head_at(path, **hub) or _load_whole(path, options)
    if kind == SELF_DRAFT:
        return SelfDraft.load(path, document, **hub)
    if Path(path, "config.json").is_file():
        raise ValueError(
            f"{path!r} holds a model (config.json) and an adapter (adapter_config.json), so it is not clear which is "
            "meant: put the adapter into a folder of its own, or merge it (merge_and_unload)"
        )
    base, revision = _base_of(adapter, local_base)
    config, state = read_adapter(path, **hub)
    model: Any = _load_whole(base, {**options, "revision": revision})
    if vars(model).get("peft_config"):
        raise ValueError(f"{adapter}: its base {base!r} has an adapter itself; merge that one (merge_and_unload)")
    put_adapter(model, config, state, f"the adapter {path!r}")
    model._hf_peft_config_loaded = True  # as transformers' own `load_adapter` does
    return model.eval()


def _base_of(adapter: str, local_base: bool) -> tuple[str, str | None]:
    """The base that an adapter_config.json names, and its revision."""
    document = read_object(adapter)
    base, revision = document.get("base_model_name_or_path"), document.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter}: base_model_name_or_path={shown(base)}; expected the base's Hub id or path")
    if not local_base and not is_hub_id(base):
        raise ValueError(
            f"{adapter}: base_model_name_or_path={shown(base)} is a path, which csdraft does not open for a cascade "
            "from elsewhere; if the path is yours, pass local_bases=True to CascadeDrafter.from_pretrained"
        )
    return base, revision if isinstance(revision, str) else None


def _load_whole(path: str, options: dict[str, Any]) -> nn.Module:
    """A model with all of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

    options = {"trust_remote_code": False} | options | {"ignore_mismatched_sizes": True}  # which we check below
    kept = {key: value for key, value in options.items() if key in HUB_OPTIONS or key == "trust_remote_code"}
    name, hub = f"{path}/config.json", {key: value for key, value in options.items() if key in HUB_OPTIONS}
    document, _ = PreTrainedConfig.get_config_dict(path, **hub)
    check_config(document, name)
    config = AutoConfig.from_pretrained(path, **kept)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        _check_sizes(path, config.get_text_config(decoder=True))
        model, found = auto.from_pretrained(path, **options, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{path!r}: {error}; it may be cut short: get it again") from error
    except ImportError as error:
        if not isinstance(quantised := document.get("quantization_config"), dict):
            raise
        raise ValueError(
            f"{name}: quantization_config.quant_method={shown(quantised.get('quant_method'))} needs a package that is "
            f"not installed ({error}); install it, or save the model without quantization"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path!r} lacks {len(missing)} weight{'s' * (len(missing) > 1)}, such as {', '.join(missing[:SOME])}; "
            "transformers would put random numbers in their place: save the whole model"
        )
    if wrong := sorted(found["mismatched_keys"]):
        shapes = [f"{name} of shape {tuple(stored)}, not {tuple(own)}" for name, stored, own in wrong[:SOME]]
        raise ValueError(f"{path!r} has weights that do not fit its config.json: {', '.join(shapes)}")
    if found["error_msgs"]:
        raise ValueError(f"{path!r}: {'; '.join(map(str, found['error_msgs'][:SOME]))}")
    return model.eval()


def _check_sizes(path: str, config: Any) -> None:
    """Raises ValueError if a folder's config.json describes a larger model than its weights, before it is built.

    A model of a billion layers or tokens would use up time or memory before its weights are found to be missing.
    """
    count, largest = 0, 1
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - no dict
        except SafetensorError as error:
            raise SafetensorError(f"{file} cannot be read ({error})") from error
        count, largest = count + len(shapes), max([largest, *(size for shape in shapes for size in shape)])
    limits = dict.fromkeys(LAYERS, count) | dict.fromkeys(WIDTHS, PACKED * largest)
    for key, limit in limits.items() if count else ():
        value = getattr(first_layer(config), key, None)
        if isinstance(value, int) and value > limit:
            raise ValueError(
                f"{path!r}: its config.json has {key}={value}, but its weights are {count} tensors with sizes up to "
                f"{largest}; get the files again, or correct the key"
            )


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers: torch.compile's, data parallelism's, PEFT's (adapters stay active)."""
    model = unwrapped(model)
    inner = getattr(model, "get_base_model", None)
    return unwrapped(inner()) if inner is not None else model


def given_model(model: nn.Module | str | os.PathLike, place: str) -> nn.Module:
    """The model that was given for an option, loaded from its path or Hub id, without its wrappers.

    Raises:
        ValueError: it is something else; `place` names the option.
    """
    loaded = load_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    found = base_model(loaded) if isinstance(loaded, nn.Module) else None
    if getattr(found, "config", None) is None:
        raise ValueError(f"{place}={shown(model)} is {kind_of(loaded)}; give a transformers model, its path or Hub id")
    return found  # type: ignore[return-value]


def check_reviewer(model: nn.Module, call: Call) -> None:
    """Raises ValueError if `model` cannot draft or review for this call's target."""
    if isinstance(model, OnTarget):
        model()  # raises an error that says so
    if reason := refusal(model):
        raise ValueError(reason)
    target = call.target
    own, wanted = (m.config.get_text_config(decoder=True).vocab_size for m in (model, target))  # type: ignore[union-attr]
    if abs(own - wanted) > MOST_VOCABULARY_PADDING:
        raise ValueError(
            f"drafter {name_of(model)} has {own} tokens, target {name_of(target)} has {wanted}; "
            "a drafter must share the target's tokenizer (a few padding rows may differ): train one with it"
        )
    if model.config.is_encoder_decoder != target.config.is_encoder_decoder:  # type: ignore[union-attr]
        kinds = ["decoder-only", "encoder-decoder"]
        raise ValueError(
            f"drafter {name_of(model)} is {kinds[model.config.is_encoder_decoder]}, "  # type: ignore
            f"target {name_of(target)} is {kinds[target.config.is_encoder_decoder]}; both must be alike"  # type: ignore
        )
