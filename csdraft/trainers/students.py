"""Students: what is distilled. A model that exists, a new one, or a LoRA adapter (arXiv 2106.09685) on either.

An adapter may also stand on some of the target's own layers (self-drafting): it drafts with weights that are in memory
anyway.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from csdraft import spec
from csdraft.drafters.model import base_model, load_model
from csdraft.heads.layers import check_layers
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import (
    SelfDraft,
    own_layers,
    peft_package,
)
from csdraft.heads.tied import TiedDraft, borrowed
from csdraft.trainers.engines import uses
from csdraft.trainers.new_students import cut_out, from_scratch, narrow_config, new_config
from csdraft.trainers.student_files import load_student_weights, put_adapter, save_student

__all__ = ["added_share", "check_engine", "check_student", "load_student_weights", "make_student", "save_student"]

CUT = ("layers", "encoder_layers", "hidden_size", "tie_to_target")
SHARED = ("layers", "encoder_layers")
"""Keys of a `peft` block that are not LoRA's: they make it self-drafting."""
SET_HERE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
SET_HERE |= {"inference_mode", "runtime_config", "layer_replication"}
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights alone."""


def check_student(
    config: Any,
    student: nn.Module | str | None = None,
    init: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError for what `make_student` cannot make; needs the target's config only.

    Args:
        config: the target's.
        student, init, peft: see `make_student`.
    """
    shared = bool(peft) and any(key in peft for key in SHARED)
    ways = [name for name, given in (("student", student is not None), ("init", init is not None)) if given]
    ways += ["layers in peft"] if shared else []
    if len(ways) != 1:
        raise ValueError(
            f"{' and '.join(ways) or 'no student'} given; choose one: student (a folder or Hub id), init "
            "({from_target: {layers: [...]}} or {config: {...}}), or layers in peft (self-drafting)"
        )
    if peft is not None:
        _check_peft(config, peft, shared)
    if init is None:
        return
    if peft is not None:
        raise ValueError(
            "peft with init: a new student is trained whole; for LoRA on the target's layers put them in peft"
        )
    spec.check_keys(init, ("from_target", "config"), "init")
    if len(init) != 1 or not isinstance(next(iter(init.values())), Mapping):
        raise ValueError(f"init={dict(init)}: give {{from_target: {{layers: [...]}}}} or {{config: {{...}}}}")
    if "config" in init:
        new_config(config, init["config"])
    else:
        cut = init["from_target"]
        spec.check_keys(cut, CUT, "init.from_target")
        check_layers(config, cut.get("layers"), cut.get("encoder_layers"))
        if cut.get("hidden_size") is not None:
            narrow_config(config, cut["hidden_size"])
            if cut.get("tie_to_target"):
                raise ValueError(
                    "tie_to_target with hidden_size: the target's embedding has the target's width; leave one out"
                )
        if not isinstance(cut.get("tie_to_target", False), bool):
            raise ValueError(f"tie_to_target={cut['tie_to_target']!r} must be true or false")


def _check_peft(config: Any, peft: Mapping[str, Any], shared: bool) -> None:
    known = [field.name for field in fields(peft_package().LoraConfig) if field.init and field.name not in SET_HERE]
    spec.check_keys(peft, [*SHARED, *known], "peft (LoRA)")
    if not shared:
        return
    check_layers(config, peft.get("layers"), peft.get("encoder_layers"))
    bias, start = peft.get("bias", "none"), peft.get("init_lora_weights", True)
    if bias != "none" or start not in HARMLESS_STARTS:
        raise ValueError(
            f"bias={bias!r}, init_lora_weights={start!r}: on shared weights they would change the target's own; use "
            f"bias 'none' and one of {HARMLESS_STARTS}"
        )
    check_engine(peft)


def check_engine(peft: Mapping[str, Any] | None, deepspeed: Any = None, fsdp: Any = None) -> None:
    """Raises ValueError if a self-drafting student is to be trained by an engine that shards or moves its weights.

    Args:
        peft: see `make_student`; only one with `layers` is self-drafting.
        deepspeed, fsdp: of `TrainingArguments`; what `accelerate launch` has chosen is known from the environment.
    """
    if not peft or not any(key in peft for key in SHARED):
        return
    asked = {"DeepSpeed": bool(deepspeed), "FSDP": bool(fsdp)}
    for engine in asked:
        if asked[engine] or uses(engine):
            raise ValueError(
                f"a self-drafting student cannot be trained under {engine}: its layers are the target's own tensors, "
                "which the engine (ZeRO, FSDP) would shard or move as the student's. Use DDP or one process, or give "
                "the student layers of its own: init: {from_target: {layers: [...]}}"
            )


def make_student(
    target: nn.Module | str,
    student: nn.Module | str | None = None,
    init: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
) -> Any:
    """A student for this target. Students that are trained whole are float32; adapters too, on a base as it is.

    Args:
        target: the model, whole, or its folder or Hub id.
        student: a model with the target's tokenizer, or the folder or Hub id of one, or of an adapter to train on.
        init: instead: `{"from_target": {"layers": [0, 5, 11]}}`, a model of its own with copies of these layers of the
            target; `encoder_layers` of a T5-like target (all if left out); `hidden_size` keeps the first channels
            only, which is a start rather than a model. Or `{"config": {...}}`: random weights, a config's options, all
            others at the class's defaults; `model_type` is the target's unless given. With `tie_to_target` (of
            `from_target`) its embedding and output layer stay the target's: frozen, and not saved with it.
        peft: options of `peft.LoraConfig`, for LoRA on `student`. With `layers` (and `encoder_layers`) it is LoRA on
            these layers of the target itself, on shared weights: self-drafting. Patterns in it see the layers' new
            numbers, from 0.

    Raises:
        ValueError: see `check_student`; or the target's family cannot be cut.
    """
    target = load_model(target, dtype="auto") if isinstance(target, str) else base_model(target)
    check_student(target.config, student, init, peft)
    if peft is not None:
        options = {key: value for key, value in peft.items() if key not in SHARED}
        if student is None:
            return _with_lora(own_layers(target, peft["layers"], peft.get("encoder_layers")), options)
        return _with_lora(_opened(student), options)
    if init is None:
        return _continued(student, target) if isinstance(student, str | os.PathLike) else student
    if "config" in init:
        return from_scratch(target, init["config"])
    return cut_out(target, **init["from_target"])


# A model, or an adapter, that exists.


def _opened(student: Any) -> nn.Module:
    """The base of an adapter, in its own dtype."""
    model = load_model(os.fspath(student), dtype="auto") if isinstance(student, str | os.PathLike) else student
    if isinstance(model, OnTarget) or vars(model).get("peft_config"):
        kind = "tied to its target" if isinstance(model, TiedDraft) else "an adapter already"
        raise ValueError(f"student {student!r} is {kind}; leave peft out to train on, or give its base")
    return model


def _with_lora(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    peft = peft_package()
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
    return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, **options))


def _continued(path: str, target: nn.Module) -> nn.Module:
    """A stored student, ready to be trained on."""
    model = load_model(os.fspath(path), dtype=torch.float32)
    if isinstance(model, TiedDraft):
        return model.open(target, torch.float32)
    if isinstance(model, SelfDraft):
        model.check(target)
        options = copy.deepcopy(model.options)
        options.inference_mode, options.base_model_name_or_path = False, None
        network = peft_package().get_peft_model(model.layers_of(target), options)
        put_adapter(network, model.state)
        return network
    if vars(model).get("peft_config"):  # transformers has put it on its base, to decode with
        peft = peft_package()
        base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
        return peft.PeftModel.from_pretrained(load_model(base, dtype="auto"), path, is_trainable=True)
    return model


def added_share(student: Any, target: nn.Module) -> float:
    """Parameters that the student needs beside the target's own, as a share of the target's.

    Of a self-drafting adapter those of LoRA alone; of LoRA on a small model that model's, too; of a student that is
    tied to the target all but the embedding and the output layer.
    """
    target = base_model(target)
    kept = {parameter.data_ptr() for parameter in target.parameters()} - {0}  # 0: weights that are elsewhere
    lent = borrowed(base_model(student))
    # ds_numel: of a parameter that ZeRO-3 keeps in parts, the size of the whole.
    added = sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in student.named_parameters()
        if p.data_ptr() not in kept and name not in lent
    )
    return added / target.num_parameters()  # type: ignore[operator]
