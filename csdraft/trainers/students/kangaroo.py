"""Kangaroo (arXiv 2404.18911): an adapter on the target's own first layers, trained like a whole small model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from csdraft.heads.kinds.kangaroo import KangarooDraft, KangarooOptions, check_exit
from csdraft.stored import fit
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.self_draft import check_engine

__all__ = ["Kangaroo"]


class Kangaroo(Student):
    """See `Student`."""

    rate = 5e-5
    needs_target = shares_target = True

    def is_of(self, model: nn.Module) -> bool:
        return vars(model).get("stored_by") is KangarooDraft

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        check_exit(config, _asked(options).layers)
        check_engine(True)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        return KangarooDraft.new(target, _asked(options).layers)


def _asked(options: Mapping[str, Any]) -> KangarooOptions:
    return fit(options, KangarooOptions, "init.kangaroo")
