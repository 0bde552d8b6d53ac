"""Negative logarithm of the acceptance rate, -log of the sum over tokens of min(target, student).

The likelihood loss of LK losses (arXiv 2602.23881). Like total variation, it trains the rate at which rejection
sampling accepts. Its gradient stays large even where drafts are hardly ever accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csdraft.losses._log_probs import log_probs

__all__ = ["acceptance"]


def acceptance(student_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """-log sum min(target, student) of each position, in nats.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.

    Returns:
        (positions,) float32, >= 0 up to rounding, 0 where the two agree; finite even where they share no token.
    """
    return -torch.minimum(log_probs(student_logits), log_probs(target_logits)).logsumexp(-1)
