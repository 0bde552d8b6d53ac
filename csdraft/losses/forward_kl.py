"""Forward KL, sum over tokens of target * log(target / student): the student must cover all likely target tokens.

The usual knowledge distillation (Hinton et al., arXiv 1503.02531), and the first choice here. Its gradient is that of
cross-entropy on soft labels. One of DistillSpec's divergences (arXiv 2310.08461, section 4).
"""

from __future__ import annotations

from torch import Tensor

from csdraft.losses._log_probs import log_probs

__all__ = ["forward_kl"]


def forward_kl(student_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(target || student) of each position, in nats.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.

    Returns:
        (positions,) float32, >= 0 and 0 where the two agree. If the student has a logit of -inf for a token and the
        target does not, that token costs 1e4 times its target probability, not infinity.
    """
    student, target = log_probs(student_logits), log_probs(target_logits)  # (positions, vocab) each
    return (target.exp() * (target - student)).sum(-1)
