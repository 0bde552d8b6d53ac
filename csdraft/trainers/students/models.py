"""Whole models as students: an existing one, LoRA (arXiv 2106.09685) on one, and a new one with random weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from csdraft import spec
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import adapter_state, peft_package, read_document
from csdraft.heads.tied import TiedDraft
from csdraft.models import base_model, load_model
from csdraft.stored import fit
from csdraft.trainers.students._student import Counts, Student, check_names

__all__ = ["Lora", "Scratch", "Whole", "check_lora", "new_config", "with_lora"]

SET_HERE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
SET_HERE |= {"inference_mode", "runtime_config", "layer_replication", "alora_invocation_tokens"}
"""Options of LoRA that are not the user's to set. With `alora_invocation_tokens`, nothing would be trained."""
STARTS = (True, False, "gaussian", "orthogonal")
"""Starts of an adapter that is saved without its base's weights: they neither change these nor are made of them."""


class Whole(Student):
    """A whole model, or a stored student of any kind. See `Student`."""

    rate = 2e-5

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> Any:
        if not isinstance(student := options["student"], str | os.PathLike):
            return student
        path = os.fspath(student)
        model: Any = load_model(path, dtype=torch.float32)
        if isinstance(model, OnTarget):
            return model.open(target, torch.float32)
        if not vars(model).get("peft_config"):
            return model
        peft = peft_package()  # an adapter, which `load_model` loads for decoding alone
        base = load_model(peft.PeftConfig.from_pretrained(path).base_model_name_or_path, dtype="auto")
        return peft.PeftModel.from_pretrained(base, path, is_trainable=True)


class Lora(Student):
    """See `Student`. Also loads the weights of an adapter on the target's own layers."""

    rate = 2e-4

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        return with_lora(_opened(options["student"]), options["peft"])

    def load_weights(self, student: Any, folder: str) -> None:
        model, peft = base_model(student), peft_package()
        _check_base(model, folder)
        state = peft.load_peft_weights(folder, device="cpu")  # PEFT adds the base's embedding if it has an adapter
        state = {key: tensor for key, tensor in state.items() if ".base_layer." not in key}
        check_names(state, adapter_state(model), folder)
        peft.set_peft_model_state_dict(student, state)


def check_lora(peft: Mapping[str, Any]) -> None:
    """Raises ValueError if an option is not LoRA's."""
    if given := [key for key in ("layers", "encoder_layers", "shared") if key in peft]:
        layers = ", ".join(f"{key}: {peft[key]}" for key in given if key != "shared")
        raise ValueError(
            f"peft={dict(peft)} has {' and '.join(given)}, which are not options of LoRA. For self-drafting give "
            f"init: {{from_target: {{{layers or 'layers: [...]'}, shared: true}}}}, and only LoRA's options in peft"
        )
    config = peft_package().LoraConfig
    known = [field.name for field in fields(config) if field.init and field.name not in SET_HERE]
    spec.check_keys(peft, known, "peft (LoRA)")
    hints = get_type_hints(config) | {"lora_alpha": float}
    for key in (key for key in peft if hints[key] in (int, float)):
        fit(peft[key], hints[key], f"peft.{key}")
    if peft.get("r", 1) < 1:
        raise ValueError(f"peft.r={peft['r']} is a rank: give at least 1")
    if (start := peft.get("init_lora_weights", True)) not in STARTS:
        raise ValueError(f"peft.init_lora_weights={start!r} may depend on the base or change it; use one of {STARTS}")


def with_lora(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    peft = peft_package()
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
    return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, **options))


def _opened(student: Any) -> nn.Module:
    """The base of an adapter, in its own dtype."""
    model = load_model(os.fspath(student), dtype="auto") if isinstance(student, str | os.PathLike) else student
    if isinstance(model, OnTarget) or vars(model).get("peft_config"):
        kind = "tied to its target" if isinstance(model, TiedDraft) else "an adapter already"
        raise ValueError(f"student {student!r} is {kind}; leave peft out to train it further, or give its base")
    return model


def _check_base(model: Any, folder: str) -> None:
    """Raises ValueError if a self-drafting adapter in a folder is for another base or other layers."""
    own = vars(model).get("self_draft")
    document = read_document(folder) or {}
    stored, layers = document.get("base", {}).get("fingerprint"), document.get("layers")
    if (own and own.fingerprint) != stored or (own and list(own.layers)) != layers:
        raise ValueError(
            f"{folder} holds an adapter for layers {layers} of the base {stored}, the student has layers "
            f"{own and list(own.layers)} of {own and own.fingerprint}; resume with the options it was trained with"
        )


# New models.

FROM_TARGET = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
LONGEST = 2048
"""Context of a new model if the target's config has none."""


class Scratch(Student):
    """See `Student`."""

    rate = 3e-4

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        new_config(config, options)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        config = new_config(target.config, options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        student = auto.from_config(config, dtype=torch.float32)
        student.generation_config = copy.deepcopy(target.generation_config)
        return student


def new_config(config: Any, options: Mapping[str, Any]) -> Any:
    """A config with these options, and the target's vocabulary and special tokens.

    Args:
        options: `model_type` (default: the target's), and options of a config of that type.
    """
    options = dict(options)
    kind = options.pop("model_type", config.model_type)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r} is unknown to transformers: {spec.nearest(kind, CONFIG_MAPPING)[:400]}")
    made = CONFIG_MAPPING[kind]
    own = {field.name for field in fields(made)} | {key for key in vars(made()) if key[0] != "_"}
    spec.check_keys(options, sorted((own | set(made.attribute_map)) - set(FROM_TARGET)), f"init.config ({kind})")
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    # Also those that are None: the class's default ids are other tokens.
    given = {key: getattr(text, key, None) for key in FROM_TARGET}
    if "max_position_embeddings" in own:
        given["max_position_embeddings"] = getattr(text, "max_position_embeddings", None) or LONGEST
    try:
        result = made(**(given | options))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"init.config: {' '.join(str(error).split())}") from error
    if result.is_encoder_decoder != config.is_encoder_decoder:
        raise ValueError(
            f"init.config: {kind!r} is {'an encoder-decoder' if result.is_encoder_decoder else 'decoder-only'}, the "
            f"target {config.model_type!r} is not; both must be alike"
        )
    return result
