"""Rejection sampling: accept a token with target / draft probability, else draw from max(target - draft, 0).

The rule of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318), with its recursive form for trees
of independent draws (SpecInfer, arXiv 2305.09781). Use it to compare with the literature, or where coupled noise is
not wanted. It needs the true (vocab,) distribution of every drafted token; `Match` does not.

Point masses (n-gram, retrieval, argmax drafts) are accepted with the target's probability. The distribution of every
emitted token is reported, lenience included, so that a reviewer one level up can verify it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Verifier
from csdraft.verifiers._stepwise import Stepwise, drawn_from, residual
from csdraft.verifiers.lenient import Lenient, check_lenience

__all__ = ["Rejection"]


@dataclass(frozen=True)
class Rejection(Stepwise):
    """Accepts with probability target / draft, sibling after sibling (see the module).

    Args:
        lenience: >= 1; above 1 only for inner reviewers of chains: accept with lenience * target / draft probability.
            It does not apply to point masses (CS Drafting, appendix B). Greedy decoding uses the rule of `Lenient`.
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

    def emitted_probs(self, draft: Draft, node: int, aim: Tensor) -> Tensor:
        """(vocab,) `aim`; with lenience min(draft, lenience * aim), and the rest of the mass from the residual."""
        children = draft.children(node)
        draft_probs = drawn_from(draft, children[0]) if children else None
        if self.lenience == 1 or draft_probs is None:
            return aim
        kept = torch.minimum(draft_probs.to(aim), self.lenience * aim)  # (vocab,)
        return kept + (1 - kept.sum()).clamp(min=0) * residual(aim, draft, children[0])
