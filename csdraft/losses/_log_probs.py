"""Log-probabilities that are always finite, and the target's most probable tokens, for all losses."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FLOOR", "log_probs", "top_tokens"]

FLOOR = -1e4
"""Stands for log 0: its exponential is 0, and 0 * FLOOR is 0, while 0 * -inf is NaN."""


def log_probs(logits: Tensor) -> Tensor:
    """(positions, vocab) float32 log-softmax, no lower than `FLOOR`.

    A logit of -inf, as in padded vocabularies and masks, gets probability 0 and no gradient.
    """
    return logits.float().log_softmax(-1).clamp(min=FLOOR)


def top_tokens(logs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(positions, k) the `k` largest log-probabilities and their tokens, or all of a smaller vocabulary."""
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more: the number of the target's tokens that count")
    return logs.topk(min(k, logs.shape[-1]), sorted=False)
