"""Generalised Jensen-Shannon divergence: both models' KL to their mixture, bounded, between forward and reverse KL.

Equation 1 of GKD (arXiv 2306.13649); one of DistillSpec's divergences (arXiv 2310.08461, section 4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csdraft.losses._log_probs import log_probs

__all__ = ["jsd"]


def jsd(student_logits: Tensor, target_logits: Tensor, labels: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(target || mixture) + (1 - beta) KL(student || mixture), mixture = beta target + (1 - beta) student.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.
        beta: between 0 and 1. The loss / beta tends to forward KL for beta -> 0, loss / (1 - beta) to reverse KL for
            beta -> 1.

    Returns:
        (positions,) float32 in nats, >= 0, 0 where the two agree, at most log 2.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1; for the two ends use forward_kl and reverse_kl")
    student, target = log_probs(student_logits), log_probs(target_logits)  # (positions, vocab) each
    mixture = torch.logaddexp(target + math.log(beta), student + math.log1p(-beta))  # (positions, vocab)
    of_target = (target.exp() * (target - mixture)).sum(-1)
    return beta * of_target + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
