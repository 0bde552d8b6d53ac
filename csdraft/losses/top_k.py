"""The top-k loss of HASS (arXiv 2408.15766): cross-entropy on the target's most probable tokens alone.

A draft is mostly accepted for its likely tokens, so the student should first be right about them. All other tokens
are dropped, and the probabilities are not rescaled to 1. So this is not a divergence: it is not 0 where the two agree,
and used alone it shifts the other tokens' probability to the top ones. HASS adds it to another loss. `top_k_kl` is a
divergence of this kind.
"""

from __future__ import annotations

from torch import Tensor

from csdraft.losses._log_probs import log_probs, top_tokens

__all__ = ["top_k"]

ZERO_AT_EQUALITY = False


def top_k(student_logits: Tensor, target_logits: Tensor, labels: Tensor, *, k: int = 10) -> Tensor:
    """The sum over the target's top `k` tokens of -target * log(student), of each position, in nats.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.
        k: the number of tokens that count, at least 1; with the whole vocabulary it is forward KL plus the target's
            entropy.

    Returns:
        (positions,) float32, >= 0.
    """
    student, target = log_probs(student_logits), log_probs(target_logits)  # (positions, vocab) each
    target_top, top = top_tokens(target, k)  # (positions, k) each
    return -(target_top.exp() * student.gather(-1, top)).sum(-1)
