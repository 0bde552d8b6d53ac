"""Stop head: a model drafter continues until a rejection somewhere in the draft becomes too likely.

SpecDec++ (arXiv 2405.19715) shows that the best policy stops when the probability of at least one rejection exceeds a
threshold. That is one minus the product of the tokens' predicted chances to be kept. A small head predicts the
chances; `csdraft.trainers.stop_head` trains it in seconds on drafts that a target has verified. It reads confidence,
entropy and depth instead of the paper's hidden state, so it knows the token just drafted, while the paper's head is
one token behind. Without a head, the confidence is taken as the chance: a baseline that needs no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from csdraft.decoding.interfaces import Budget, Context, Drafter, Schedule
from csdraft.decoding.limits import check_range
from csdraft.tables.acceptance_head import AcceptanceHead

__all__ = ["StopHead"]


@dataclass(frozen=True)
class StopHead(Schedule):
    """Drafts up to `depth` tokens, and stops after the token that lifts P(some token is rejected) above `threshold`.

    Args:
        head: a trained head, or the path of a saved one; None takes the confidence as the chance.
        threshold: in [0, 1]; larger drafts longer, and 1 never stops early. The paper's best is 0.7.
        depth: the most draft tokens per round.
    """

    head: AcceptanceHead | str | Path | None = None
    threshold: float = 0.7
    depth: int = 20

    def __post_init__(self) -> None:
        check_range("a stop_head schedule", self, depth=None)
        check_range("a stop_head schedule", self, 0, threshold=1)
        if isinstance(self.head, (str, Path)):
            object.__setattr__(self, "head", AcceptanceHead.load(self.head))

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        return [Budget(min(self.depth, room), min(self.depth, room), stop=StopWhenUnlikely(self)) for room in rooms]


class StopWhenUnlikely:
    """The stop rule of one row's draft: `alive` is the chance that all of it will be kept.

    Args:
        options: the schedule.
    """

    def __init__(self, options: StopHead):
        self.options, self.alive, self.depth = options, 1.0, 0

    def __call__(self, confidence: float, entropy: Callable[[], float]) -> bool:
        head = self.options.head
        if isinstance(head, AcceptanceHead):
            self.alive *= head(confidence, entropy(), self.depth)
        else:
            self.alive *= confidence
        self.depth += 1
        return 1 - self.alive > self.options.threshold
