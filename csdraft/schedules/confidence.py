"""Confidence: a model drafter continues as long as the tokens it drafts have a high probability.

The dynamic stop of transformers' assisted generation (`assistant_confidence_threshold`) and of many papers: a token
drafted with a probability below the threshold is the last of its draft. The token itself is kept, so stopping never
depends on which token was drawn, and sampling stays exact. It costs a softmax per drafted token. A vertical cascade
stops after the inner round that emitted such a token, and keeps that round's later tokens. Statistical drafters ignore
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.interfaces import Budget, Context, Drafter, Schedule
from csdraft.decoding.limits import check_range

__all__ = ["Confidence"]


@dataclass(frozen=True)
class Confidence(Schedule):
    """Drafts up to `depth` tokens, and stops after the first with a confidence below `threshold`.

    Args:
        threshold: softmax probability in [0, 1]; 0 never stops early.
        depth: the most draft tokens per round.
    """

    threshold: float = 0.4
    depth: int = 20

    def __post_init__(self) -> None:
        check_range("a confidence schedule", self, depth=None)
        check_range("a confidence schedule", self, 0, threshold=1)

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        unsure = lambda confidence, entropy: confidence < self.threshold  # noqa: E731
        return [Budget(min(self.depth, room), min(self.depth, room), stop=unsure) for room in rooms]
