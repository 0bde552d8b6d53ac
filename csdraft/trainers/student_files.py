"""Students on disk: folders that `ModelDrafter` loads, and their weights put back into a student made in this way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from csdraft.heads.self_draft import (
    PREFIX,
    SelfDraft,
    adapter_state,
    peft_package,
    read_document,
    write_document,
)
from csdraft.heads.stored_head import head_at
from csdraft.heads.tied import TiedDraft, borrowed
from csdraft.models import base_model

__all__ = ["load_student_weights", "put_adapter", "save_student", "save_tokenizer"]


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
    Path(folder).mkdir(parents=True, exist_ok=True)
    model = base_model(student)
    if "stored_by" in vars(model):
        kind: Any = model.stored_by
        kind.of(model, state_dict).save(folder)
    elif "self_draft" in vars(model):
        SelfDraft.of(model).save(folder)
    elif "tied_to" in vars(model):
        TiedDraft.of(model, state_dict).save(folder, model)
    else:
        student.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
        write_document(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, os.fspath(folder))


def save_tokenizer(tokenizer: Any, folder: str) -> None:
    """As `save_pretrained`, but tokenizer.json on one line: less than half the bytes in git."""
    for key in ("is_local", "local_files_only"):  # how it was loaded; transformers would write them down
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(f"{folder}/tokenizer.json", pretty=False)


def load_student_weights(student: Any, folder: str | os.PathLike[str]) -> None:
    """Puts the weights that `save_student` wrote into a student made in the same way.

    Raises:
        ValueError: the folder holds another student.
    """
    folder = os.fspath(folder)
    model: Any = base_model(student)
    if vars(model).get("peft_config"):
        _check_base(model, folder)
        state = peft_package().load_peft_weights(folder, device="cpu")
        _check_names(state, adapter_state(model), folder)
        put_adapter(student, state)
        return
    stored_head = head_at(folder) if "stored_by" in vars(model) else None
    if stored_head is not None:
        state, own = stored_head.state, model.stored_by.of(model).state  # a head decides what it stores
    else:
        state, own = _read_weights(folder), model.state_dict()
        stored = {own[key].data_ptr() for key in state if key in own}
        tied = {key for key, tensor in own.items() if key not in state and tensor.data_ptr() in stored}
        tied |= borrowed(model).keys()
        own = {key: tensor for key, tensor in own.items() if key not in tied}
    _check_names(state, own, folder)
    model.load_state_dict(state, strict=False)  # tied weights are stored once


def put_adapter(network: Any, state: dict[str, Tensor]) -> None:
    """Puts an adapter's tensors into the network that carries it."""
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
