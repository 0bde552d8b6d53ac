"""LoRA (arXiv 2106.09685) on an existing model: the adapter is trained, the model does not change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from torch import nn

from csdraft import spec
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import adapter_state, peft_package, read_document
from csdraft.heads.tied import TiedDraft
from csdraft.models import base_model, load_model
from csdraft.stored import fit
from csdraft.trainers.students._student import Counts, Student, check_names

__all__ = ["Lora", "check_lora", "with_lora"]


SET_HERE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
SET_HERE |= {"inference_mode", "runtime_config", "layer_replication", "alora_invocation_tokens"}
"""Options of LoRA that are not the user's to set. With `alora_invocation_tokens`, nothing would be trained."""
STARTS = (True, False, "gaussian", "orthogonal")
"""Starts of an adapter that is saved without its base's weights: they neither change these nor are made of them."""


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
