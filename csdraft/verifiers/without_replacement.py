"""Recursive rejection without replacement: tests each sibling against what its rejected siblings left over.

RSD (arXiv 2402.14160) and Sequoia (arXiv 2402.12374), which adds that a draft distribution with nothing left becomes
uniform. A sibling cannot repeat a rejected token, so it is worth more than an independent draw. Use it with trees that
are drawn without replacement, stochastic beams included. On a chain it is the same as `Rejection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import TINY, Stepwise, drawn_from, left_over, probs_without

__all__ = ["WithoutReplacement"]


@dataclass(frozen=True)
class WithoutReplacement(Stepwise):
    """Accepts with probability left / draft, both without the siblings rejected before (see the module)."""

    lossless = True  # type: ignore[assignment]
    kinds: ClassVar = frozenset({"without_replacement"})

    def tries(
        self, draft: Draft, group: Sequence[int], left: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        draft_probs, refused = drawn_from(draft, group[0]), []
        assert draft_probs is not None
        for child in group:
            token, probs = draft.tokens[child], probs_without(draft_probs, refused).to(left)
            if sampler.accepts(row, float(left[token]) / max(float(probs[token]), TINY)):
                return child, left
            left = left_over((left - probs).clamp_(min=0), left)
            refused.append(token)
        return None, left
