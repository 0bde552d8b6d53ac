"""Traversal verification: accepts or rejects whole branches, from the leaves to the root, not token by token.

Traversal verification (arXiv 2505.12398) is `Block` for trees. A branch is tried at its end first. If it is rejected,
only its last node is dropped, and the probability that this node did not supply goes to the next sibling. It is
lossless, and on average keeps at least as many tokens as the same rules from the root down. Use it at the target, with
trees drawn independently or without replacement; point masses are allowed.

It is exact, for stochastic beams too: a node that must be reached with some weight either supplies exactly that weight
of the target's distribution below it, or is rejected. The chance of rejection does not depend on the nodes below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import (
    TINY,
    accept_branch,
    check_draft,
    drawn_from,
    left_over,
    probs_without,
    unshared_probs,
)
from csdraft.verifiers.match import Match

__all__ = ["Traversal"]


@dataclass(frozen=True)
class Traversal(Verifier):
    """Accepts the first branch, leaves first, that passes its joint test (see the module). No `emitted_probs`."""

    lossless = True  # type: ignore[assignment]
    draws: ClassVar = "independent"
    looks_ahead: ClassVar[bool] = True
    kinds: ClassVar = frozenset({"iid", "without_replacement"})

    def refusal(self, draft: Draft) -> str | None:
        return super().refusal(draft) or unshared_probs(self, draft)

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        check_draft(self, draft)
        if sampler.greedy:
            return Match().verify(draft, scores, sampler, root)
        last = self.last(draft, scores, sampler, root)
        return accept_branch(draft, scores, root, last.node, lambda: sampler.draw(scores.row, last.left))

    def last(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int) -> Place:
        """The node where the accepted branch ends. Depth first: a node is tried when all its children are rejected."""
        branch = [Place(root, 1.0, scores.probs(root), iter(draft.children(root)))]
        while True:
            place = branch[-1]
            child = next(place.waiting, None)
            if child is not None:
                weight = place.weight_of(draft, child)
                branch.append(Place(child, weight, scores.probs(child), iter(draft.children(child))))
            elif len(branch) == 1 or sampler.accepts(scores.row, place.weight):
                return place
            else:
                branch.pop()
                branch[-1].refuse(draft, place.node)


@dataclass
class Place:
    """A node on the branch that is being tried.

    Attributes:
        weight: the probability with which the branch down to this node must still be accepted.
        left: (vocab,) distribution that the token after the node must then have.
        waiting: children that were not tried yet.
        refused: the tokens of rejected children, if they were drawn without replacement.
    """

    node: int
    weight: float
    left: Tensor
    waiting: Iterator[int]
    refused: list[int] = field(default_factory=list)

    def probs_of(self, draft: Draft, child: int) -> Tensor | None:
        """(vocab,) distribution that the child was drawn from, after its earlier siblings; None for a point mass."""
        probs = drawn_from(draft, child)
        return None if probs is None else probs_without(probs, self.refused).to(self.left)

    def weight_of(self, draft: Draft, child: int) -> float:
        """The weight of the branch that continues to `child`: min(1, weight * left / draft probability)."""
        token, probs = draft.tokens[child], self.probs_of(draft, child)
        wanted = self.weight * float(self.left[token])
        return wanted if probs is None else min(1.0, wanted / max(float(probs[token]), TINY))

    def refuse(self, draft: Draft, child: int) -> None:
        """Removes what `child` could have supplied from `left`; `weight` is then conditional on its rejection."""
        token, probs = draft.tokens[child], self.probs_of(draft, child)
        rest = self.weight * self.left  # (vocab,)
        if probs is None:
            rest[token] = 0
        else:
            rest = (rest - probs).clamp_(min=0)
            if draft.probs.kind == "without_replacement":  # type: ignore[union-attr]
                self.refused.append(token)
        total = float(rest.sum())
        self.left = left_over(rest, self.left)
        self.weight = total / (total + (1 - self.weight)) if total > 0 else 0.0
