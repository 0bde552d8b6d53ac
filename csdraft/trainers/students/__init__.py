"""Students: what is distilled. Each kind is a file of this folder, see `Student`; heads are, see `HeadKind`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import find_adapter_config_file

from csdraft import spec
from csdraft.heads.folder import config_at
from csdraft.heads.on_target import stored_form
from csdraft.heads.self_draft import KANGAROO, SELF_DRAFT, TIED, read_document, write_document
from csdraft.heads.stored_head import kind_at
from csdraft.heads.tied import borrowed
from csdraft.models import base_model, load_model
from csdraft.trainers.students._kind import HeadKind, kinds
from csdraft.trainers.students._student import Counts, Student, student_of, students
from csdraft.trainers.students.lora import check_lora
from csdraft.trainers.students.self_draft import check_engine

__all__ = [
    "added_share", "check_engine", "check_student", "kind_asked", "load_student_weights", "make_student",
    "save_student", "save_tokenizer",
]  # fmt: skip

KEYS = {"from_target": "cut", "config": "scratch", "kangaroo": "kangaroo"}
"""Key of `init` -> kind of student; the name of a head is both."""
KINDS = {SELF_DRAFT: "self_draft", TIED: "cut", KANGAROO: "kangaroo"}
"""Kind of a drafter.json -> kind of student."""


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
    kind, options = _asked(student, init, peft)
    kind.check(config, options)


def _asked(
    student: Any, init: Mapping[str, Any] | None, peft: Mapping[str, Any] | None
) -> tuple[Student, Mapping[str, Any]]:
    """The kind that these keys ask for, and its options; ValueError for keys that do not go together."""
    if peft is not None:
        check_lora(peft)
    ways = [name for name, given in (("student", student is not None), ("init", init is not None)) if given]
    if len(ways) != 1:
        raise ValueError(
            f"{' and '.join(ways) or 'no student'} given; choose one: student (a folder or Hub id), or init "
            "({from_target: {layers: [...]}}, with shared: true for self-drafting, {config: {...}}, or a head such as "
            "{eagle3: {}})"
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
            "peft with a head: a head is trained whole; leave peft out"
            if key in kinds()
            else "peft with init: a new student is trained whole. For LoRA on the target's own layers "
            "(self-drafting), say init: {from_target: {layers: [...], shared: true}}"
        )
    return students()[KEYS.get(key, key)], options or {}


def kind_asked(student: str | None, init: Mapping[str, Any] | None, peft: Mapping[str, Any] | None) -> Student:
    """The kind of student that these keys make; of a folder or Hub id what it holds, where any head is a `HeadKind`.

    Without any key it is a whole model; `check_student` refuses that.

    Args:
        student, init, peft: see `make_student`.
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
            self-drafting. `{"kangaroo": {"layers": 2}}`: an adapter after so many of the target's own first layers.
            Or the name of a file of this folder, such as `{"eagle3": {...}}`: a head, see its options.
        counts: how often each token is to be predicted in the training text, for heads that draft only some.
        peft: options of `peft.LoraConfig`, for LoRA on `student` or on shared layers. Patterns in it see the layers'
            new numbers, from 0.

    Raises:
        ValueError: see `check_student`; or the target's family cannot be cut.
    """
    target = load_model(target, dtype="auto") if isinstance(target, str) else base_model(target)
    check_student(target.config, student, init, peft)
    kind, options = _asked(student, init, peft)
    return kind.make(target, options, counts)


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
    stored: Any = stored_form(base_model(student), state_dict)
    if stored is not None:
        stored.save(folder)
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
    student_of(student).put_back(student, os.fspath(folder))


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
