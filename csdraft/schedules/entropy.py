"""Entropy: a model drafter continues while the entropy of its distribution says that its token will likely be kept.

AdaEDL (arXiv 2410.18351): 1 - sqrt(gamma * H) is a training-free lower estimate of the chance that a token drawn from
a distribution with entropy H is accepted. Drafting ends when it falls below a threshold. Use it for sampled texts: the
confidence of a drawn token is noisy, the entropy of its distribution is not. The paper tests before it draws. Here, as
in every schedule, the token is drawn and kept first, so stopping never depends on which token was drawn, and drafts
are one token longer. The threshold can follow the acceptance rate, as in Draft & Verify (arXiv 2309.08168, section
3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.decoding.limits import check_range

__all__ = ["Entropy"]

RATE_MEMORY, THRESHOLD_MEMORY, STEP = 0.5, 0.9, 0.01
"""Draft & Verify's beta1 and beta2 (weights of the past), and its epsilon (the step of the threshold)."""


@dataclass(frozen=True)
class Entropy(Schedule):
    """Drafts up to `depth` tokens, and stops after the first with 1 - sqrt(gamma * entropy) < threshold.

    Args:
        gamma: scale of the entropy, in nats; 0.2 in the paper.
        threshold: the estimate needed to continue, in [0, 1]; with `rate`, its first value. 0 continues up to an
            entropy of 1 / gamma nats.
        rate: the acceptance rate to aim for. While fewer tokens are kept, the threshold rises and drafts get shorter;
            otherwise it falls. None: the threshold does not change.
        depth: the most draft tokens per round.
    """

    gamma: float = 0.2
    threshold: float = 0.4
    rate: float | None = None
    depth: int = 20

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be above 0; to never stop early, use the schedule 'fixed'")
        check_range("an entropy schedule", self, depth=None)
        check_range("an entropy schedule", self, 0, threshold=1, **({} if self.rate is None else {"rate": 1}))

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return self if self.rate is None else EntropyRun(self, self.rate)

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        return [self.budget(room, self.threshold) for room in rooms]

    def budget(self, room: int, threshold: float) -> Budget:
        """The budget of one row with this threshold."""

        def unsure(confidence: float, entropy: Callable[[], float]) -> bool:
            return 1 - math.sqrt(self.gamma * entropy()) < threshold

        return Budget(min(self.depth, room), min(self.depth, room), stop=unsure)


class EntropyRun(Schedule):
    """The thresholds of one call; each row of a batch has its own."""

    def __init__(self, options: Entropy, rate: float):
        self.options, self.rate = options, rate
        self.thresholds: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        start = self.options.threshold
        thresholds = [self.thresholds.get(context.row, start) for context in contexts]
        return [self.options.budget(*pair) for pair in zip(rooms, thresholds, strict=True)]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        for finished in rounds:
            if not finished.drafted:
                continue
            row, share = finished.context.row, finished.accepted / finished.depth
            seen = self.rates[row] = RATE_MEMORY * self.rates.get(row, share) + (1 - RATE_MEMORY) * share
            old = self.thresholds.get(row, self.options.threshold)
            moved = old + (STEP if seen < self.rate else -STEP)
            new = THRESHOLD_MEMORY * old + (1 - THRESHOLD_MEMORY) * moved
            self.thresholds[row] = min(max(new, 0.0), 1.0)
