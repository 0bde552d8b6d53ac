"""Total variation, half the sum over tokens of |target - student|: the chance that a drafted token is rejected.

It is 1 - the acceptance rate of rejection sampling (Leviathan et al., arXiv 2211.17192, theorem 3.5). DistillSpec
(arXiv 2310.08461) aims to raise that rate, yet finds that total variation is rarely the best loss to train with: its
gradient does not depend on how much two probabilities differ.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["total_variation"]


def total_variation(student_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """Total variation of each position.

    Args:
        student_logits, target_logits: (positions, vocab) of any float dtype, computed in float32; labels are not used.

    Returns:
        (positions,) float32 from 0, where the two agree, to 1.
    """
    return 0.5 * (target_logits.float().softmax(-1) - student_logits.float().softmax(-1)).abs().sum(-1)
