"""Compares expected with measured rejections, to tell whether the drafter or the verifier limits the drafts.

At each position that it tests, rejection sampling rejects with a probability equal to the total variation between the
target's distribution and the draft's. No unbiased rule that decides token by token rejects less (Yin et al., arXiv
2411.00841). So the sum of total variations is the number of rejections to expect with the best such rule. If more are
measured, the rule is at fault. If fewer are, siblings in a tree or a joint test of a block saved some. If the numbers
agree, only a better drafter helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Round, ScoresView

__all__ = ["Rejections"]

DEVIATIONS = 2.0
"""Fewer standard deviations than this between both numbers count as agreement."""


@dataclass
class Rejections:
    """Counts over positions at which a verifier had a drafted token to test.

    Attributes:
        judged: positions.
        measured: positions at which no drafted token was kept.
        expected: sum of their total variations, that of siblings being the first sibling's.
        variance: of the number of rejections, if each position rejects with its total variation as probability.
    """

    judged: int = 0
    measured: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def add(self, rounds: Sequence[Round]) -> None:
        """Counts finished rounds of independent draws, while they still have scores: O(vocabulary) per position."""
        for finished in rounds:
            draft, kept = finished.draft, finished.verdict.accepted
            ended = finished.verdict.next_token is None
            above = [finished.context.tip, *kept[: len(kept) - ended]]  # nothing is tested after the end
            for node in above:
                if children := draft.children(node):
                    distance = total_variation(draft, children[0], finished.scores, node)
                    self.judged += 1
                    self.expected += distance
                    self.variance += distance * (1 - distance)
            self.measured += not ended and bool(draft.children(above[-1]))

    def merged(self, other: Rejections) -> Rejections:
        """Both together."""
        return Rejections(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def deviations(self) -> float:
        """How many standard deviations the measured rejections lie above the expected ones."""
        excess = self.measured - self.expected
        return excess / self.variance**0.5 if self.variance > 0 else 0.0

    @property
    def limit(self) -> str:
        """What limits the length of accepted drafts, in words."""
        if self.deviations > DEVIATIONS:
            return "more than the distributions explain: the rule is the limit"
        if self.deviations < -DEVIATIONS:
            return "fewer than with a test of single tokens: siblings or a joint test help"
        return "as many as the distributions explain: the drafter is the limit"


def total_variation(draft: Draft, child: int, scores: ScoresView, node: int) -> float:
    """Between the reviewer's distribution after `node` and the one that `child` was drawn from.

    A child without a known distribution counts as a point mass.
    """
    target_probs = scores.probs(node)
    draft_probs = None if draft.probs is None else draft.probs.rows[child]
    if draft_probs is None:
        return 1.0 - float(target_probs[draft.tokens[child]])
    return max(1.0 - float(target_probs.minimum(draft_probs.to(target_probs)).sum()), 0.0)
