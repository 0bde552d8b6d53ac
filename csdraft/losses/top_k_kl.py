"""Forward KL over the target's most probable tokens and one more outcome, "any other token".

Use it if only the target's top logits are stored, or to spend the student's capacity on tokens that may be drafted.
It is still a divergence, because the other tokens count as one outcome: it is never negative, at most forward KL, and
0 only if the student's top probabilities and its total for the rest are right. (HASS's loss, `top_k`, drops the rest
and is not 0 where the two agree.)
"""

from __future__ import annotations

from torch import Tensor

from csdraft.losses._log_probs import FLOOR, log_probs, top_tokens

__all__ = ["top_k_kl"]


def top_k_kl(student_logits: Tensor, target_logits: Tensor, labels: Tensor, *, k: int = 64) -> Tensor:
    """KL(target || student) of each position, tokens outside the target's top `k` counted as one; in nats.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.
        k: the number of tokens that count separately, at least 1; with the whole vocabulary it is forward KL.

    Returns:
        (positions,) float32, >= 0 and 0 where the two agree.
    """
    student, target = log_probs(student_logits), log_probs(target_logits)  # (positions, vocab) each
    target_top, top = top_tokens(target, k)  # (positions, k) each
    student_top = student.gather(-1, top)  # (positions, k)
    target_rest, student_rest = (
        logs.scatter(-1, top, FLOOR).logsumexp(-1) for logs in (target, student)
    )  # (positions,)
    inside = (target_top.exp() * (target_top - student_top)).sum(-1)  # (positions,)
    return inside + target_rest.exp() * (target_rest - student_rest)
