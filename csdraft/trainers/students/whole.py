"""An existing model, trained further: a whole one, or a stored student of any kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from csdraft.heads.on_target import OnTarget
from csdraft.models import load_model
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.lora import stored_adapter

__all__ = ["Whole"]


class Whole(Student):
    """See `Student`."""

    rate = 2e-5

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> Any:
        if not isinstance(student := options["student"], str | os.PathLike):
            return student
        path = os.fspath(student)
        model: Any = load_model(path, dtype=torch.float32)
        if isinstance(model, OnTarget):
            return model.open(target, torch.float32)
        return stored_adapter(path) if vars(model).get("peft_config") else model
