"""Kangaroo (arXiv 2404.18911): an adapter on the target's own first layers, trained like a whole small model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from csdraft.heads.kinds.kangaroo import KangarooDraft, KangarooOptions, check_exit
from csdraft.stored import fit
from csdraft.trainers.students._student import Counts, Student

__all__ = ["Kangaroo"]


class Kangaroo(Student):
    """An adapter after the target's first layers. See `Student`."""

    rate = 5e-5
    needs_target = shares_target = True

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        check_exit(config, fit(options, KangarooOptions, "init.kangaroo").layers)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        return KangarooDraft.new(target, fit(options, KangarooOptions, "init.kangaroo").layers)
