"""Block verification (Sun et al., arXiv 2403.10444): tests the tokens of a draft jointly, not one by one.

It is lossless and on average keeps at least as many tokens as `Rejection`; the paper reports 5 to 8 percent less wall
time. Use it for chains drawn from a model, at the target only. Point masses are allowed, but gain nothing over
`Rejection`. By design the trials do not end at a failed token: a success further down accepts the whole prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import accept_branch, check_draft, ratio, residual, unexplained

__all__ = ["Block"]


@dataclass(frozen=True)
class Block(Verifier):
    """Accepts the longest prefix with a successful joint test (see the module). Not for inner levels."""

    lossless = True  # type: ignore[assignment]
    draws: ClassVar = "independent"
    looks_ahead: ClassVar[bool] = True
    kinds: ClassVar = frozenset({"iid"})
    chains_only: ClassVar = True

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        check_draft(self, draft)
        nodes = range(root + 1, len(draft))
        target_probs = [scores.probs(node) for node in (root, *nodes)]  # (vocab,) each
        # weights[i] is the clipped running ratio target / draft of the first i tokens (p_i of the paper).
        weights = [1.0]
        for i, node in enumerate(nodes):
            weights.append(min(1.0, weights[i] * ratio(target_probs[i], draft, node)))
        chances = weights[1:]  # of keeping the first 1, 2, ... tokens; the last one's is its weight
        for i, node in enumerate(nodes[1:], start=1):
            if weights[i] < 1:
                left = float(unexplained(weights[i] * target_probs[i], draft, node).sum())
                chances[i - 1] = left / (left + 1 - weights[i])

        kept = self.longest(chances, scores.row, sampler)
        left = target_probs[kept]  # (vocab,)
        if kept < len(nodes):
            left = residual(weights[kept] * left, draft, nodes[kept])
        return accept_branch(draft, scores, root, root + kept, lambda: sampler.draw(scores.row, left))

    def longest(self, chances: Sequence[float], row: int, sampler: Sampler) -> int:
        """How many tokens are kept: one independent trial for each length, longest first; the first success counts."""
        for length in range(len(chances), 0, -1):
            if sampler.accepts(row, chances[length - 1]):
                return length
        return 0
