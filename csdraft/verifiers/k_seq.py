"""K-SEQ: siblings drawn independently are tried in turn, each with probability target / (rho * draft).

SpecTr (arXiv 2310.15141): bisection finds the least rho for which no token is accepted more often than the target has
it. This rule accepts at least 1 - 1/e of what any rule could. Use it with independent draws instead of `Rejection`: it
is usually a little better, and the same with one sibling. Rho depends on the number of siblings, so that number must
be fixed before the first one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import TINY, Stepwise, drawn_from, left_over

__all__ = ["KSeq"]

HALVINGS = 12
"""Bisection steps. A rho above the least is exact too; it costs at most about (k - 1) / 2^12 of the acceptance."""


@dataclass(frozen=True)
class KSeq(Stepwise):
    """Accepts with probability target / (rho * draft), sibling after sibling (see the module)."""

    lossless = True  # type: ignore[assignment]
    kinds: ClassVar = frozenset({"iid"})

    def tries(
        self, draft: Draft, group: Sequence[int], left: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        draft_probs = drawn_from(draft, group[0])
        assert draft_probs is not None
        target_probs, draft_probs = left.double(), draft_probs.to(left).double()
        rho = least_rho(target_probs, draft_probs, len(group))
        for child in group:
            token = draft.tokens[child]
            if sampler.accepts(row, float(target_probs[token]) / max(rho * float(draft_probs[token]), TINY)):
                return child, left
        kept = torch.minimum(draft_probs, target_probs / rho)  # (vocab,)
        one = float(kept.sum())
        rest = (target_probs - kept * (any_of(one, len(group)) / max(one, TINY))).clamp_(min=0)
        return None, left_over(rest, target_probs).to(left)


def any_of(one: float, count: int) -> float:
    """The probability that one of `count` independent trials succeeds."""
    return 1 - (1 - min(one, 1.0)) ** count


def least_rho(target_probs: Tensor, draft_probs: Tensor, count: int) -> float:
    """The least rho in [1, count] for which no token is accepted more often than the target has it.

    With beta = sum of min(draft, target / rho), it is where 1 - (1 - beta)^count falls to rho * beta.
    """

    def valid(rho: float) -> bool:
        one = float(torch.minimum(draft_probs, target_probs / rho).sum())
        return any_of(one, count) <= rho * one

    low, high = 1.0, float(count)
    if valid(low):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if valid(middle) else (middle, high)
    return high
