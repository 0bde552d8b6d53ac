"""Falcon as a student (arXiv 2412.12639): compares distributions, and the features that they come from.

The paper's losses are `losses: {forward_kl: 0.09, cross_entropy: 0.01}` beside `regression: 1.0`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csdraft.heads.formats.own import OwnHead
from csdraft.heads.kinds.falcon import Falcon
from csdraft.trainers.students.eagle import EagleStudent

__all__ = ["FalconStudent"]


class FalconStudent(EagleStudent):
    """See `EagleStudent`."""

    trains, stored_by = Falcon, OwnHead

    def further(self, head: Any, outputs: Tensor, features: Tensor) -> Tensor | None:
        return super().further(head, head.first(outputs), head.first(features))
