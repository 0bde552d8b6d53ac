"""Measures how well a drafter fits its target: plain functions of logits and counts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["by_position", "expected_acceptance", "greedy_agreement", "tokens_per_call"]


def expected_acceptance(draft_logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Chance that rejection sampling accepts a token drawn from the drafter: the sum of the smaller probabilities.

    Leviathan et al., arXiv 2211.17192, corollary 3.6; it is 1 - total variation.

    Args:
        draft_logits: (..., vocab) of any float dtype, computed in float32.
        target_logits: (..., vocab) likewise. If the two vocabularies differ by padding, the wider one is cut.
        temperature: above 0; divides both logits.

    Returns:
        (...) float32 from 0 to 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; for greedy drafts there is greedy_agreement")
    draft, target = _same_width(draft_logits, target_logits)
    draft_probs = (draft.float() / temperature).softmax(-1)
    return torch.minimum(draft_probs, (target.float() / temperature).softmax(-1)).sum(-1)


def greedy_agreement(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Whether both have the same most probable token.

    Args:
        draft_logits: (..., vocab).
        target_logits: (..., vocab); see `expected_acceptance`.

    Returns:
        (...) bool.
    """
    draft, target = _same_width(draft_logits, target_logits)
    return draft.argmax(-1) == target.argmax(-1)


def by_position(values: Tensor, positions: Tensor) -> dict[int, float]:
    """Mean of the values at each position.

    Args:
        values: (count,) numbers or truth values.
        positions: (count,) integers that group the values, such as positions in a text or in a draft.

    Returns:
        Means by position, the lowest first.
    """
    if values.shape != positions.shape:
        raise ValueError(f"{values.numel()} values and {positions.numel()} positions; give one position per value")
    values = values.float()
    return {int(position): float(values[positions == position].mean()) for position in positions.unique()}


def tokens_per_call(emitted: Iterable[float], calls: Iterable[float]) -> float:
    """Block efficiency from counts: all emitted tokens / all calls of the target; 0 if there are no calls.

    Args:
        emitted: each text's emitted tokens.
        calls: each text's calls of the target; the one that reads the prompt counts if it emits a token.
    """
    emitted, calls = list(emitted), list(calls)
    if len(emitted) != len(calls):
        raise ValueError(f"tokens of {len(emitted)} texts and calls of {len(calls)}; give both for each text")
    if min([*emitted, *calls], default=0) < 0:
        raise ValueError(f"tokens {emitted} and calls {calls} are counts: none may be below 0")
    return sum(emitted) / sum(calls) if sum(calls) else 0.0


def _same_width(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    width = min(draft_logits.shape[-1], target_logits.shape[-1])
    return draft_logits[..., :width], target_logits[..., :width]
