"""Rejection sampling: accept a token with target / draft probability, else draw from what the draft did not supply.

The rule of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318), with its recursive form for trees
of independent draws (SpecInfer, arXiv 2305.09781). Use it to compare with the literature, or where coupled noise is
not wanted; it needs the true distribution of every token, (vocab,) numbers each, which `Match` does without.

Point masses (n-gram, retrieval, argmax drafts) are distributions like any other: accepted with the target's
probability. Every emitted token's own distribution is reported, so that a reviewer one level up can judge it exactly,
lenience included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._lenience import check_lenience
from csdraft.verifiers._stepwise import Stepwise, drawn_from, ratio, residual
from csdraft.verifiers.lenient import Lenient

__all__ = ["Rejection"]


@dataclass(frozen=True)
class Rejection(Stepwise):
    """Accepts with probability target / draft, sibling after sibling (see the module).

    Args:
        lenience: >= 1, above 1 for inner reviewers of chains only: accept with lenience * target / draft probability.
            Point masses get none (CS Drafting, appendix B). Greedy decoding follows the rule of `Lenient`.
    """

    kinds: ClassVar = frozenset({"iid"})

    lenience: float = 1.0

    def __post_init__(self) -> None:
        check_lenience(self.lenience)

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.lenience == 1

    @property
    def chains_only(self) -> bool:  # type: ignore[override]
        return self.lenience > 1

    @property
    def reads_confidence(self) -> bool:  # type: ignore[override]
        return self.lenience > 1

    @property
    def greedy_rule(self) -> Verifier:
        return Lenient(self.lenience)

    def keeps(self, draft: Draft, node: int, aim: Tensor, row: int, sampler: Sampler) -> tuple[int | None, Tensor]:
        left = aim
        for child in draft.children(node):
            lenience = self.lenience if drawn_from(draft, child) is not None else 1.0
            if sampler.accepts(row, lenience * ratio(left, draft, child)):
                return child, left
            # A refused sibling has had its chance: remove its share before the next one is tried.
            left = residual(left, draft, child)
        return None, left

    def emitted_probs(self, draft: Draft, node: int, aim: Tensor) -> Tensor:
        """(vocab,) distribution of the token emitted after `node`: the reviewer's own, unless lenience bends it."""
        children = draft.children(node)
        draft_probs = drawn_from(draft, children[0]) if children else None
        if self.lenience == 1 or draft_probs is None:
            return aim
        kept = torch.minimum(draft_probs.to(aim), self.lenience * aim)
        return kept + (1 - kept.sum()).clamp(min=0) * residual(aim, draft, children[0])
