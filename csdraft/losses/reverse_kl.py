"""Reverse KL, sum over tokens of student * log(student / target): the student must avoid what the target avoids.

It is mode-seeking: a small student learns the part that it can imitate (MiniLLM, arXiv 2306.08543). One of
DistillSpec's divergences (arXiv 2310.08461, section 4).
"""

from __future__ import annotations

from torch import Tensor

from csdraft.losses._log_probs import log_probs

__all__ = ["reverse_kl"]


def reverse_kl(student_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(student || target) of each position, in nats.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.

    Returns:
        (positions,) float32, >= 0 and 0 where the two agree. If the target has a logit of -inf for a token and the
        student does not, that token costs 1e4 times its student probability, not infinity: cut such logits off, or
        use `jsd`.
    """
    student, target = log_probs(student_logits), log_probs(target_logits)  # (positions, vocab) each
    return (student.exp() * (student - target)).sum(-1)
