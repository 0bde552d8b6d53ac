"""Speculative cascades: the drafter's token is kept unless a rule finds the target's to be better by a margin.

Speculative cascades (arXiv 2405.19261). Not lossless: at a drafted position the rule mixes the drafter's and the
target's distribution, and the text has exactly this mixture (`mixture`). At positions without a drawn token (point
masses and the bonus token) it has the target's distribution. Use it where the drafter is good enough in some places,
and quality is judged by the answers, not by the distribution.

The paper decides by the models' distributions at temperature 1. Here the rule uses the distributions that tokens are
drawn from; they are the same at temperature 1 without truncation. Greedy decoding uses the softmax probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import ScoresView, Verifier
from csdraft.decoding.limits import check_range
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import Stepwise, drawn_from
from csdraft.verifiers.match import Match

__all__ = ["Deferral"]

Rule = Literal["chow", "diff", "opt", "token_v1", "token_v2", "token_v3"]


@dataclass(frozen=True)
class Deferral(Stepwise):
    """Tests drawn tokens against a mixture of the drafter's and the target's distribution (see the module).

    Args:
        rule: three rules keep all of the drafter's tokens if its greatest probability is large enough ("chow": >= 1 -
            margin; "diff": >= the target's greatest - margin; "opt": >= the target's greatest - margin * total
            variation). Three decide for each token: "token_v1": draft probability >= the target's greatest - margin;
            "token_v2": target probability >= the same; "token_v3": target probability >= (1 - margin) * the target's
            greatest.
        margin: in [0, 1]: alpha of the paper, the cost of deferring to the target.
    """

    lossless = False  # type: ignore[assignment]
    kinds: ClassVar = frozenset({"iid"})
    reads_confidence: ClassVar = True

    rule: Rule = "token_v3"
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule={self.rule!r} must be one of {', '.join(get_args(Rule))}")
        check_range("a deferral verifier", self, 0, margin=1)

    @property
    def greedy_rule(self) -> Verifier:
        return GreedyDeferral(self)

    def aim(self, draft: Draft, node: int, target_probs: Tensor) -> Tensor:
        all_probs = (drawn_from(draft, child) for child in draft.children(node))
        draft_probs = next((probs for probs in all_probs if probs is not None), None)
        return target_probs if draft_probs is None else self.mixture(draft_probs.to(target_probs), target_probs)

    def mixture(self, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
        """(vocab,) distribution at a drafted position: the drafter's for kept tokens, the target's for the rest."""
        distance = (draft_probs - target_probs).clamp(min=0).sum()  # ()
        kept = self.keeps_draft(draft_probs, target_probs, draft_probs.max(), target_probs.max(), distance)
        deferred = torch.where(kept, 0, draft_probs)  # (vocab,) mass of the tokens that are not kept
        return draft_probs - deferred + deferred.sum() * target_probs

    def keeps_draft(self, draft_prob: Any, target_prob: Any, draft_most: Any, target_most: Any, distance: Any) -> Any:
        """Whether the drafter's token is kept, for one token or for all: bool, () or (vocab,).

        Args:
            draft_prob, target_prob: the probabilities of the token, or of each token.
            draft_most, target_most: the greatest probability of each distribution.
            distance: total variation between the distributions.
        """
        value, bar = {
            "chow": (draft_most, 1 - self.margin),
            "diff": (draft_most, target_most - self.margin),
            "opt": (draft_most, target_most - self.margin * distance),
            "token_v1": (draft_prob, target_most - self.margin),
            "token_v2": (target_prob, target_most - self.margin),
            "token_v3": (target_prob, (1 - self.margin) * target_most),
        }[self.rule]
        return value >= bar


@dataclass(frozen=True)
class GreedyDeferral(Match):
    """The rule for greedy decoding: the child with the target's token, else the first child that the rule keeps."""

    deferral: Deferral

    def keeps(self, draft: Draft, node: int, scores: ScoresView, sampler: Sampler) -> int | None:
        chosen = super().keeps(draft, node, scores, sampler)
        if chosen is not None:
            return chosen
        for child in draft.children(node):
            token, draft_prob = draft.tokens[child], draft.confidence[child]
            if math.isnan(draft_prob):  # a point mass
                continue
            target_prob, target_most = scores.soft(node, token), scores.soft(node, scores.choice(node))
            # The drafted token is the drafter's likeliest. Two different one-hot distributions have distance 1.
            if self.deferral.keeps_draft(draft_prob, target_prob, draft_prob, target_most, 1.0):
                return child
        return None
