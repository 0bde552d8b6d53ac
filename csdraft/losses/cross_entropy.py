"""Cross-entropy with the text's next token: ordinary training, without the target's logits.

On the target's own text it is sequence-level distillation (Kim and Rush, arXiv 1606.07947).
"""

from __future__ import annotations

from torch import Tensor

from csdraft.losses._log_probs import log_probs

__all__ = ["cross_entropy"]

ZERO_AT_EQUALITY = False
"""The loss compares the student with a token, not with the target, so it is not 0 where the two agree."""


def cross_entropy(student_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """-log of the student's probability of each position's next token, in nats.

    Args:
        student_logits: (positions, vocab) of any float dtype, computed in float32.
        target_logits: not used.
        labels: (positions,) int64 tokens.

    Returns:
        (positions,) float32, >= 0.
    """
    return -log_probs(student_logits).gather(-1, labels[:, None]).squeeze(-1)
