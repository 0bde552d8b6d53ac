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
from csdraft.heads.layers import check_layers
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import (
    SelfDraft,
    own_layers,
    peft_package,
)
from csdraft.heads.stored_head import StoredHead
from csdraft.heads.tied import TiedDraft, borrowed
from csdraft.models import base_model, load_model
from csdraft.trainers.engines import uses
from csdraft.trainers.new_students import cut_out, from_scratch, narrow_config, new_config
from csdraft.trainers.rates import is_shared
from csdraft.trainers.student_files import load_student_weights, put_adapter, save_student
from csdraft.trainers.students._kind import Counts, asked_kind, kinds

__all__ = ["added_share", "check_engine", "check_student", "load_student_weights", "make_student", "save_student"]

LAYERS = ("layers", "encoder_layers")
CUT = (*LAYERS, "hidden_size", "tie_to_target", "shared")
"""Keys of `init.from_target`."""
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
    if peft is not None:
        _check_peft(peft)
    ways = [name for name, given in (("student", student is not None), ("init", init is not None)) if given]
    if len(ways) != 1:
        raise ValueError(
            f"{' and '.join(ways) or 'no student'} given; choose one: student (a folder or Hub id), or init "
            "({from_target: {layers: [...]}}, with shared: true for self-drafting, {config: {...}}, or a head such as "
            "{eagle3: {}})"
        )
    if (asked := asked_kind(init)) is not None and len(init or ()) == 1:
        if peft is not None:
            raise ValueError("peft with a head: a head is trained whole; leave peft out")
        asked[0].check(config, asked[1])
    elif init is not None:
        _check_init(config, init, peft)


def _check_init(config: Any, init: Mapping[str, Any], peft: Mapping[str, Any] | None) -> None:
    spec.check_keys(init, ("from_target", "config", *kinds()), "init")
    if len(init) != 1 or not isinstance(next(iter(init.values())), Mapping):
        raise ValueError(f"init={dict(init)}: give {{from_target: {{layers: [...]}}}} or {{config: {{...}}}}")
    cut = init.get("from_target", {})
    spec.check_keys(cut, CUT, "init.from_target")
    for switch in ("tie_to_target", "shared"):
        if not isinstance(cut.get(switch, False), bool):
            raise ValueError(f"{switch}={cut[switch]!r} must be true or false")
    shared = is_shared(init)
    if peft is not None and not shared:
        raise ValueError(
            "peft with init: a new student is trained whole. For LoRA on the target's own layers (self-drafting), say "
            "init: {from_target: {layers: [...], shared: true}}"
        )
    if "config" in init:
        new_config(config, init["config"])
        return
    check_layers(config, cut.get("layers"), cut.get("encoder_layers"))
    if shared:
        _check_shared(cut, peft)
    elif cut.get("hidden_size") is not None:
        narrow_config(config, cut["hidden_size"])
        if cut.get("tie_to_target"):
            raise ValueError(
                "tie_to_target with hidden_size: the target's embedding has the target's width; leave one out"
            )


def _check_peft(peft: Mapping[str, Any]) -> None:
    """Raises ValueError unless all options are LoRA's."""
    if given := [key for key in (*LAYERS, "shared") if key in peft]:
        layers = ", ".join(f"{key}: {peft[key]}" for key in given if key != "shared")
        raise ValueError(
            f"peft={dict(peft)} has {' and '.join(given)}, which are not options of LoRA. Self-drafting is asked for "
            f"by init: {{from_target: {{{layers or 'layers: [...]'}, shared: true}}}}; peft keeps LoRA's own options"
        )
    known = [field.name for field in fields(peft_package().LoraConfig) if field.init and field.name not in SET_HERE]
    spec.check_keys(peft, known, "peft (LoRA)")


def _check_shared(cut: Mapping[str, Any], peft: Mapping[str, Any] | None) -> None:
    """Raises ValueError for what an adapter on the target's own layers cannot have."""
    if made := [key for key in ("hidden_size", "tie_to_target") if cut.get(key)]:
        raise ValueError(
            f"shared: true with {made[0]}: shared layers are the target's own, and {made[0]} is for copies of them; "
            "leave one out"
        )
    if not peft:
        raise ValueError(
            "shared: true needs peft, such as peft: {r: 64, lora_alpha: 128}: the layers are the target's own and "
            "stay as they are, so an adapter on them is what is trained; for copies that are trained leave shared out"
        )
    bias, start = peft.get("bias", "none"), peft.get("init_lora_weights", True)
    if bias != "none" or start not in HARMLESS_STARTS:
        raise ValueError(
            f"bias={bias!r}, init_lora_weights={start!r}: on shared weights they would change the target's own; use "
            f"bias 'none' and one of {HARMLESS_STARTS}"
        )
    check_engine(True)


def check_engine(shared: bool, deepspeed: Any = None, fsdp: Any = None) -> None:
    """Raises ValueError if a self-drafting student is to be trained by an engine that shards or moves its weights.

    Args:
        shared: whether the student is self-drafting, see `is_shared`.
        deepspeed, fsdp: of `TrainingArguments`; what `accelerate launch` has chosen is known from the environment.
    """
    if not shared:
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
    counts: Counts | None = None,
) -> Any:
    """A student for this target. Students that are trained whole are float32; adapters too, on a base as it is.

    Args:
        target: the model, whole, or its folder or Hub id.
        student: a model with the target's tokenizer, or the folder or Hub id of one, or of an adapter to train on.
        init: instead: `{"from_target": {"layers": [0, 5, 11]}}`, a model of its own with copies of these layers of the
            target; `encoder_layers` of a T5-like target (all if left out); `hidden_size` keeps the first channels
            only, which is a start rather than a model. Or `{"config": {...}}`: random weights, a config's options, all
            others at the class's defaults; `model_type` is the target's unless given. With `tie_to_target` (of
            `from_target`) its embedding and output layer stay the target's: frozen, and not saved with it. With
            `shared` (of `from_target`) the layers are the target's own, not copies, and `peft` is trained on them:
            self-drafting. Or the name of a file of this folder, such as `{"eagle3": {...}}`: a head, see its options.
        counts: how often each token is to be predicted in the training text, for heads that draft only some.
        peft: options of `peft.LoraConfig`, for LoRA on `student` or on shared layers. Patterns in it see the layers'
            new numbers, from 0.

    Raises:
        ValueError: see `check_student`; or the target's family cannot be cut.
    """
    target = load_model(target, dtype="auto") if isinstance(target, str) else base_model(target)
    check_student(target.config, student, init, peft)
    if (asked := asked_kind(init)) is not None:
        return asked[0].make(target, asked[1], counts)
    if peft is not None and init is not None:
        cut = init["from_target"]
        return _with_lora(own_layers(target, cut["layers"], cut.get("encoder_layers")), peft)
    if peft is not None:
        return _with_lora(_opened(student), peft)
    if init is None:
        return _continued(student, target) if isinstance(student, str | os.PathLike) else student
    if "config" in init:
        return from_scratch(target, init["config"])
    return cut_out(target, **{key: value for key, value in init["from_target"].items() if key != "shared"})


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
    if isinstance(model, TiedDraft | StoredHead):
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
