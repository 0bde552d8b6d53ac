"""EAGLE-1 as a student (arXiv 2401.15077): compares distributions, and the features that they come from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from csdraft.heads.formats.eagle import EagleHead
from csdraft.heads.kinds.eagle import Eagle
from csdraft.trainers.students._kind import HeadKind

__all__ = ["EagleStudent"]


class EagleStudent(HeadKind):
    """See `HeadKind`."""

    trains, stored_by = Eagle, EagleHead

    def further(self, head: Any, outputs: Tensor, features: Tensor) -> Tensor | None:
        """Smooth L1 between the head's outputs and the target's features, a mean over the width."""
        if not head.options.regression:
            return None
        off = smooth_l1_loss(outputs.float(), features.float(), reduction="none")  # (positions, width)
        return head.options.regression * off.mean(-1).sum()
