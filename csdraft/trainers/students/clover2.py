"""Clover-2 as a student (arXiv 2408.00264): distributions are compared, and the hidden states that they come from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from csdraft.heads.kinds.clover2 import Clover2
from csdraft.trainers.students._kind import HeadKind

__all__ = ["Clover2Student"]


class Clover2Student(HeadKind):
    """See `HeadKind`."""

    trains = Clover2

    def further(self, head: Any, outputs: Tensor, features: Tensor) -> Tensor:
        """Smooth L1 between what it drafts from and the target's hidden state, a mean over the width."""
        width = head.config.hidden_size
        off = smooth_l1_loss(head.drafts_from(outputs), features[:, :width], reduction="none")  # (positions, width)
        return head.options.regression * off.mean(-1).sum()
