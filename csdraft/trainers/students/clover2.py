"""Clover-2 as a student (arXiv 2408.00264): compares distributions, and the hidden states that they come from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csdraft.heads.formats.own import OwnHead
from csdraft.heads.kinds.clover2 import Clover2
from csdraft.trainers.students.eagle import EagleStudent

__all__ = ["Clover2Student"]


class Clover2Student(EagleStudent):
    """See `EagleStudent`."""

    trains, stored_by = Clover2, OwnHead

    def further(self, head: Any, outputs: Tensor, features: Tensor) -> Tensor | None:
        return super().further(head, head.drafts_from(outputs), features[:, : head.config.hidden_size])
