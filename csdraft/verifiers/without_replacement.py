"""Recursive rejection without replacement: each sibling judged by the law that its refused elders had left for it.

RSD (arXiv 2402.14160) and Sequoia (arXiv 2402.12374), which adds that a law with nothing left goes on as the uniform
one. A sibling that cannot repeat a refused token is worth more than an independent draw: use it with trees drawn
without replacement, stochastic beams included. On a chain it is `Rejection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import TINY, Stepwise, drawn_from, law_without, left_over, shared_laws

__all__ = ["WithoutReplacement"]


@dataclass(frozen=True)
class WithoutReplacement(Stepwise):
    """Accepts with probability left / draft, both without the siblings refused before (see the module)."""

    lossless = True  # type: ignore[assignment]
    kinds: ClassVar = frozenset({"without_replacement"})

    def refusal(self, draft: Draft) -> str | None:
        return super().refusal(draft) or shared_laws(self, draft)

    def tries(
        self, draft: Draft, group: Sequence[int], left: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        draft_probs, refused = drawn_from(draft, group[0]), []
        assert draft_probs is not None
        for child in group:
            token, law = draft.tokens[child], law_without(draft_probs, refused).to(left)
            if sampler.accepts(row, float(left[token]) / max(float(law[token]), TINY)):
                return child, left
            left = left_over((left - law).clamp_(min=0), left)
            refused.append(token)
        return None, left
