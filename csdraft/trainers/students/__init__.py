"""Students are the models that are distilled. Each kind is a file of this folder, or a head; see `Student`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import find_adapter_config_file

from csdraft import spec
from csdraft.heads.folder import config_at
from csdraft.heads.on_target import stored_form
from csdraft.heads.self_draft import KANGAROO, SELF_DRAFT, TIED, read_document, write_document
from csdraft.heads.stored_head import kind_at
from csdraft.heads.tied import borrowed
from csdraft.models import base_model, load_model
from csdraft.trainers.engines import check_engine
from csdraft.trainers.students._kind import HeadKind, kinds, student_of, students
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.lora import check_lora

__all__ = [
    "added_share", "check_engine", "check_student", "kind_asked", "load_student_weights", "make_student",
    "save_student", "save_tokenizer",
]  # fmt: skip

KEYS = {"from_target": "cut", "config": "scratch", "kangaroo": "kangaroo"}
"""Key of `init` -> kind of student. For heads, both are the head's name."""
KINDS = {SELF_DRAFT: "self_draft", TIED: "cut", KANGAROO: "kangaroo"}
"""Kind of a drafter.json -> kind of student."""


def check_student(
    config: Any,
    student: nn.Module | str | None = None,
    init: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
) -> tuple[Student, Mapping[str, Any]]:
    """The kind of student that these keys make, and its options.

    Raises:
        ValueError: `make_student` cannot make this student for a target with this config.
    """
    kind, options = _asked(student, init, peft)
    check_engine(kind.shares_target)
    kind.check(config, options)
    return kind, options


def _asked(
    student: Any, init: Mapping[str, Any] | None, peft: Mapping[str, Any] | None
) -> tuple[Student, Mapping[str, Any]]:
    """The kind of student that these keys make, and its options; ValueError for keys that exclude each other."""
    if peft is not None:
        check_lora(peft)
    if (student is None) == (init is None):
        raise ValueError(
            f"{'no student' if init is None else 'student and init'} given; choose one: student (a folder or Hub id), "
            "or init ({from_target: {layers: [...]}}, with shared: true for self-drafting, {config: {...}}, or a head "
            "such as {eagle3: {}}); in a recipe the other is null"
        )
    if init is None:
        return students()["whole" if peft is None else "lora"], {"student": student, "peft": peft}
    spec.check_keys(init, (*KEYS, *kinds()), "init")
    if len(init) != 1 or not isinstance(next(iter(init.values())), Mapping | None):
        raise ValueError(f"init={dict(init)}: give {{from_target: {{layers: [...]}}}} or {{config: {{...}}}}")
    ((key, options),) = init.items()
    if key == "from_target" and options and options.get("shared"):
        return students()["self_draft"], {"cut": options, "peft": peft}
    if peft is not None:
        raise ValueError(
            "peft with init: a new student is trained whole; leave peft out. For LoRA on the target's own layers "
            "(self-drafting), say init: {from_target: {layers: [...], shared: true}}"
        )
    return students()[KEYS.get(key, key)], options or {}


def kind_asked(student: str | None, init: Mapping[str, Any] | None, peft: Mapping[str, Any] | None) -> Student:
    """The kind of student that these keys make. Any stored head is a plain `HeadKind`.

    Without keys it is a whole model, which `check_student` refuses.
    """
    if init is not None or peft is not None:
        return _asked(student, init, peft)[0]
    if student is None:
        return students()["whole"]
    config = config_at(student)
    if config is not None and kind_at(student, config) is not None:
        return HeadKind()
    document, adapter = read_document(student) or {}, find_adapter_config_file(student)
    return students()[KINDS.get(document.get("kind", ""), "lora" if adapter else "whole")]


def make_student(
    target: nn.Module | str,
    student: nn.Module | str | None = None,
    init: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
    counts: Counts | None = None,
) -> Any:
    """A student for this target. What is trained is float32; the base of an adapter keeps its dtype.

    Args:
        target: the whole model, or its folder or Hub id.
        student: a model with the target's tokenizer, or the folder or Hub id of a model, or of an adapter to train
            further.
        init: makes a new student instead, one of
            `{"from_target": {"layers": [0, 5, 11]}}`: a model with copies of these layers of the target. Options:
                `encoder_layers` of a T5-like target (default: all); `tie_to_target` keeps the target's embedding and
                output layer, frozen and not saved; `shared` uses the target's own layers, not copies, and trains
                `peft` on them: self-drafting;
            `{"config": {...}}`: random weights. Options of a config; the others have the class's defaults, and
                `model_type` is the target's by default;
            `{"kangaroo": {"layers": 2}}`: an adapter after this many of the target's own first layers;
            `{"eagle3": {...}}`, or another head: see the options in its file in `csdraft/heads/kinds`.
        peft: options of `peft.LoraConfig`, for LoRA on `student` or on shared layers. Its patterns see the layers'
            new numbers, from 0.
        counts: how often each token is a label in the training text, for heads that draft only some tokens.

    Raises:
        ValueError: see `check_student`; or models of the target's family cannot be cut.
    """
    target = load_model(target, dtype="auto") if isinstance(target, str) else base_model(target)
    kind, options = check_student(target.config, student, init, peft)
    return kind.make(target, options, counts)


def save_student(
    student: Any, folder: str | os.PathLike[str], tokenizer: Any = None, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a student for `ModelDrafter` to load: a Transformers or PEFT folder, and drafter.json.

    Args:
        state_dict: the student's gathered weights, if its own parameters are sharded.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    stored: Any = stored_form(base_model(student), state_dict)
    if stored is not None:
        stored.save(folder)
    else:
        student.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
        write_document(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, os.fspath(folder))


def save_tokenizer(tokenizer: Any, folder: str) -> None:
    """Like `save_pretrained`, but tokenizer.json is on one line, which takes less than half the bytes."""
    for key in ("is_local", "local_files_only"):  # how it was loaded; transformers would save them
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, PreTrainedTokenizerFast):  # one written in Python, as ByT5's, has no such file
        tokenizer.backend_tokenizer.save(f"{folder}/tokenizer.json", pretty=False)


def load_student_weights(student: Any, folder: str | os.PathLike[str]) -> None:
    """Loads the weights that `save_student` wrote into a student made with the same options.

    Raises:
        ValueError: the folder holds another student.
    """
    student_of(student).load_weights(student, os.fspath(folder))


def added_share(student: Any, target: nn.Module) -> float:
    """The student's parameters that are not the target's own, as a share of the target's parameters.

    A self-drafting adapter adds its LoRA weights only; LoRA on a small model also that model's; a student tied to the
    target everything except embedding and output layer.
    """
    target = base_model(target)
    kept = {parameter.data_ptr() for parameter in target.parameters()} - {0}  # 0: weights on another device
    lent = borrowed(base_model(student))
    # ds_numel: the whole size of a parameter that ZeRO-3 shards.
    added = sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in student.named_parameters()
        if p.data_ptr() not in kept and name not in lent
    )
    return added / target.num_parameters()  # type: ignore[operator]
