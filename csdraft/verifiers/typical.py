"""Typical acceptance: keeps tokens that the target finds likely enough; an unsure target accepts more. Not lossless.

Medusa (arXiv 2401.10774): a drafted token is kept if its probability exceeds min(threshold, entropy_share * exp(-H)),
where H is the entropy of the target's distribution there. The longest branch of kept tokens wins, in a tie the
likelier. The text is no longer a sample of the target: it is biased towards the drafter's proposals. Greedy decoding
is unchanged. Use it with drafters that choose their tokens (heads, n-grams), where speed matters more than the
distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import accept_branch

__all__ = ["Typical"]


@dataclass(frozen=True)
class Typical(Verifier):
    """Accepts the longest branch of typical tokens; the target then draws the next token (see the module).

    Args:
        threshold: epsilon of the paper: a token with a higher probability is always kept.
        entropy_share: delta of the paper, there sqrt(epsilon): other tokens need this share of exp(-entropy).
    """

    lossless = False  # type: ignore[assignment]
    looks_ahead: ClassVar[bool] = True

    threshold: float = 0.09
    entropy_share: float = 0.3

    def __post_init__(self) -> None:
        for name in ("threshold", "entropy_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be in [0, 1): at 1 nothing could be accepted, not even a "
                    "token that the target is sure of"
                )

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        end = self.best(draft, scores, root)
        return accept_branch(draft, scores, root, end, lambda: scores.choice(end))

    def best(self, draft: Draft, scores: ScoresView, root: int) -> int:
        """The node where the longest branch of typical tokens ends; in a tie the likeliest branch, then the first."""
        found, waiting = (0, 0.0, root), [(0, 0.0, root)]
        while waiting:
            length, likelihood, node = waiting.pop()
            if (length, likelihood) > found[:2]:
                found = (length, likelihood, node)
            children = draft.children(node)
            if not children:
                continue
            target_probs = scores.probs(node)  # (vocab,)
            probs = target_probs[[draft.tokens[child] for child in children]]  # (children,)
            typical = (probs > self.bar(target_probs)).tolist()
            logs = probs.log().tolist()
            for child, kept, log_prob in reversed(list(zip(children, typical, logs, strict=True))):
                if kept:
                    waiting.append((length + 1, likelihood + log_prob, child))
        return found[2]

    def bar(self, target_probs: Tensor) -> Tensor:
        """() the probability that a token after these (vocab,) probabilities must exceed."""
        entropy = torch.special.entr(target_probs).sum()
        return (self.entropy_share * (-entropy).exp()).clamp(max=self.threshold)
