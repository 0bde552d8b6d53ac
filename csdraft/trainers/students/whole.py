"""An existing model, trained further: a whole one, or a stored student of any kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import peft_package
from csdraft.models import load_model
from csdraft.trainers.students._student import Counts, Student

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
        if not vars(model).get("peft_config"):
            return model
        peft = peft_package()  # an adapter, which `load_model` loads for decoding alone
        base = load_model(peft.PeftConfig.from_pretrained(path).base_model_name_or_path, dtype="auto")
        return peft.PeftModel.from_pretrained(base, path, is_trainable=True)
