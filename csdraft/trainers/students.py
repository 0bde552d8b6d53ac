"""Students: what is distilled. A model that exists, a new one, or a LoRA adapter (arXiv 2106.09685) on either.

An adapter may also stand on some of the target's own layers (self-drafting): it drafts with weights that are in memory
anyway.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csdraft import spec
from csdraft.drafters.model import base_model, load_model
from csdraft.heads.layers import check_layers
from csdraft.heads.self_draft import (
    PREFIX,
    SelfDraft,
    adapter_state,
    own_layers,
    peft_package,
    read_document,
    write_document,
)
from csdraft.trainers.engines import uses
from csdraft.trainers.new_students import cut_out, from_scratch, narrow_config, new_config

__all__ = ["added_share", "check_engine", "check_student", "load_student_weights", "make_student", "save_student"]

CUT = ("layers", "encoder_layers", "hidden_size")
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
            others at the class's defaults; `model_type` is the target's unless given.
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
    if isinstance(model, SelfDraft) or vars(model).get("peft_config"):
        raise ValueError(f"student {student!r} is an adapter already; leave peft out to train on, or give its base")
    return model


def _with_lora(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    peft = peft_package()
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
    return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, **options))


def _continued(path: str, target: nn.Module) -> nn.Module:
    """A stored student, ready to be trained on."""
    model = load_model(os.fspath(path), dtype=torch.float32)
    if isinstance(model, SelfDraft):
        model.check(target)
        options = copy.deepcopy(model.options)
        options.inference_mode, options.base_model_name_or_path = False, None
        network = peft_package().get_peft_model(model.layers_of(target), options)
        _put_adapter(network, model.state)
        return network
    if vars(model).get("peft_config"):  # transformers has put it on its base, to decode with
        peft = peft_package()
        base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
        return peft.PeftModel.from_pretrained(load_model(base, dtype="auto"), path, is_trainable=True)
    return model


# On disk.


def save_student(
    student: Any, folder: str | os.PathLike[str], tokenizer: Any = None, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a student as `ModelDrafter` loads it: a Transformers or PEFT folder, and drafter.json.

    Args:
        student: what `make_student` made.
        folder: made if it is not there.
        tokenizer: saved beside it.
        state_dict: the student's weights, gathered, if its own parameters are not whole.
    """
    from csdraft.trainers.tokenizer import save_tokenizer

    Path(folder).mkdir(parents=True, exist_ok=True)
    model = base_model(student)
    if "self_draft" in vars(model):
        SelfDraft.of(model).save(folder)
    else:
        student.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
        write_document(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, os.fspath(folder))


def load_student_weights(student: Any, folder: str | os.PathLike[str]) -> None:
    """Puts the weights that `save_student` wrote into a student made in the same way.

    Raises:
        ValueError: the folder holds another student.
    """
    folder, model = os.fspath(folder), base_model(student)
    if vars(model).get("peft_config"):
        _check_base(model, folder)
        state = peft_package().load_peft_weights(folder, device="cpu")
        _check_names(state, adapter_state(model), folder)
        _put_adapter(student, state)
        return
    state = _read_weights(folder)
    own = model.state_dict()
    stored = {own[key].data_ptr() for key in state if key in own}
    tied = {key for key, tensor in own.items() if key not in state and tensor.data_ptr() in stored}
    _check_names(state, {key: tensor for key, tensor in own.items() if key not in tied}, folder)
    model.load_state_dict(state, strict=False)  # tied weights are stored once


def _put_adapter(network: Any, state: dict[str, Tensor]) -> None:
    peft_package().set_peft_model_state_dict(network, state)


def _check_base(model: Any, folder: str) -> None:
    own = vars(model).get("self_draft")
    document = read_document(folder) or {}
    stored, layers = document.get("base", {}).get("fingerprint"), document.get("layers")
    if (own and own.fingerprint) != stored or (own and list(own.layers)) != layers:
        raise ValueError(
            f"{folder} holds an adapter for layers {layers} of the base {stored}, the student has layers "
            f"{own and list(own.layers)} of {own and own.fingerprint}; resume with the options it was trained with"
        )


def _check_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: str) -> None:
    other = sorted(state.keys() ^ own.keys()) or [k for k in own if state[k].shape != own[k].shape]
    if other:
        key = other[0]
        shapes = [tuple(where[key].shape) if key in where else None for where in (state, own)]
        raise ValueError(
            f"{folder} holds another student: {len(other)} tensors differ, such as {key.removeprefix(PREFIX)}, of "
            f"shape {shapes[0]} there and {shapes[1]} here; resume with the options it was trained with"
        )


def _read_weights(folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = Path(folder, "model.safetensors.index.json")
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := [name for name in sorted(files) if not Path(folder, name).is_file()]:
        raise ValueError(
            f"{folder} holds no student: it lacks {', '.join(missing)}; give a folder that a run has saved"
        )
    return {key: tensor for name in sorted(files) for key, tensor in load_file(Path(folder, name)).items()}


def added_share(student: Any, target: nn.Module) -> float:
    """Parameters that the student needs beside the target's own, as a share of the target's.

    Of a self-drafting adapter those of LoRA alone; of LoRA on a small model that model's, too.
    """
    target = base_model(target)
    kept = {parameter.data_ptr() for parameter in target.parameters()} - {0}  # 0: weights that are elsewhere
    # ds_numel: of a parameter that ZeRO-3 keeps in parts, the size of the whole.
    added = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.data_ptr() not in kept)
    return added / target.num_parameters()  # type: ignore[operator]
