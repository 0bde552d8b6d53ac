"""What the losses share: log-probabilities with which one may calculate."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FLOOR", "log_probs"]

FLOOR = -1e4
"""Stands for the logarithm of 0: its probability is 0, and 0 times it is 0, not NaN."""


def log_probs(logits: Tensor) -> Tensor:
    """(positions, vocab) float32 log-softmax, no lower than `FLOOR`.

    A logit of -inf, which padded vocabularies and masks have, gets probability 0 and no gradient.
    """
    return logits.float().log_softmax(-1).clamp(min=FLOOR)
