"""Log-probabilities that are always finite, for all losses."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FLOOR", "log_probs"]

FLOOR = -1e4
"""Stands for log 0: its exponential is 0, and 0 * FLOOR is 0, while 0 * -inf is NaN."""


def log_probs(logits: Tensor) -> Tensor:
    """(positions, vocab) float32 log-softmax, no lower than `FLOOR`.

    A logit of -inf, as in padded vocabularies and masks, gets probability 0 and no gradient.
    """
    return logits.float().log_softmax(-1).clamp(min=FLOOR)
