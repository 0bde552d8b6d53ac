"""Rejection sampling: accept a token with target / draft probability, else draw from what the draft did not supply.

The rule of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318), with its recursive form for trees
(SpecInfer, arXiv 2305.09781; RSD, arXiv 2402.14160). Use it to compare with the literature, or where coupled noise is
not wanted; it needs the true law of every token, (vocab,) numbers each, which `Match` does without.

Point masses (n-gram, retrieval, argmax drafts) are laws like any other: accepted with the target's probability.
Every emitted token's own law is reported, so that a reviewer one level up can judge it exactly, lenience included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.lenient import Lenient

__all__ = ["Rejection"]

TINY = 1e-38
"""Stands for a draft probability that was rounded to zero."""


@dataclass(frozen=True)
class Rejection(Verifier):
    """Accepts with probability target / draft, sibling after sibling (see the module).

    Args:
        lenience: >= 1, above 1 for inner reviewers of chains only: accept with lenience * target / draft probability.
            Point masses get none (CS Drafting, appendix B). Greedy decoding follows the rule of `Lenient`.
    """

    draws: ClassVar = "independent"
    kinds: ClassVar = frozenset({"iid"})

    lenience: float = 1.0

    def __post_init__(self) -> None:
        if not self.lenience >= 1:
            raise ValueError(
                f"lenience={self.lenience} must be 1 (lossless) or more; the papers' l <= 1 is 1/lenience"
            )

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.lenience == 1

    @property
    def chains_only(self) -> bool:  # type: ignore[override]
        return self.lenience > 1

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        check_draft(self, draft)
        if sampler.greedy:
            return Lenient(self.lenience).verify(draft, scores, sampler, root)
        accepted, laws, node = [], [], root
        while True:
            target_probs = scores.probs(node)
            laws.append(self.emitted_law(draft, node, target_probs))
            kept, left = self.keeps(draft, node, target_probs, scores.row, sampler)
            if kept is None:
                token = sampler.draw(scores.row, left)
                return Verdict(accepted, token, scores.ends(node, token), laws)
            accepted.append(kept)
            if scores.ends(node, draft.tokens[kept]):
                return Verdict(accepted, None, True, laws)
            node = kept

    def keeps(
        self, draft: Draft, node: int, target_probs: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        """The child of `node` to step into, or None and the (vocab,) law that the correction comes from."""
        left = target_probs
        for child in draft.children(node):
            lenience = self.lenience if drawn_from(draft, child) is not None else 1.0
            if sampler.accepts(row, lenience * ratio(left, draft, child)):
                return child, left
            # A refused sibling has had its chance: remove its share before the next one is tried.
            left = residual(left, draft, child)
        return None, left

    def emitted_law(self, draft: Draft, node: int, target_probs: Tensor) -> Tensor:
        """(vocab,) law of the token emitted after `node`: the reviewer's own, unless lenience bends it."""
        children = draft.children(node)
        draft_probs = drawn_from(draft, children[0]) if children else None
        if self.lenience == 1 or draft_probs is None:
            return target_probs
        kept = torch.minimum(draft_probs.to(target_probs), self.lenience * target_probs)
        return kept + (1 - kept.sum()).clamp(min=0) * residual(target_probs, draft, children[0])


def check_draft(verifier: Verifier, draft: Draft) -> None:
    """Raises ValueError if `verifier` cannot judge `draft` exactly."""
    if reason := verifier.refusal(draft):
        raise ValueError(reason)


def drawn_from(draft: Draft, node: int) -> Tensor | None:
    """(vocab,) law of the node's token; None for a point mass."""
    return None if draft.law is None else draft.law.rows[node]


def ratio(target_probs: Tensor, draft: Draft, node: int) -> float:
    """Target / draft probability of the node's token."""
    token, draft_probs = draft.tokens[node], drawn_from(draft, node)
    if draft_probs is None:
        return float(target_probs[token])
    return float(target_probs[token]) / max(float(draft_probs[token]), TINY)


def unexplained(target_probs: Tensor, draft: Draft, node: int) -> Tensor:
    """(vocab,) target less draft probability where positive: what the node's law does not supply."""
    draft_probs = drawn_from(draft, node)
    if draft_probs is not None:
        return (target_probs - draft_probs.to(target_probs)).clamp_(min=0)
    rest = target_probs.clone()
    rest[draft.tokens[node]] = 0
    return rest


def residual(target_probs: Tensor, draft: Draft, node: int) -> Tensor:
    """(vocab,) law that a refused node leaves behind: `unexplained`, normalised."""
    rest = unexplained(target_probs, draft, node)
    total = rest.sum()
    # Nothing is left only where both laws agree up to rounding: then the target's own law is the one to draw from.
    return rest / total if total > 0 else target_probs
