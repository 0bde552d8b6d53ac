"""Fixed: the same number of draft tokens every round, the `gamma` or `K` of the papers (arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.interfaces import Budget, Context, Drafter, Schedule
from csdraft.decoding.limits import check_range

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed(Schedule):
    """Asks for `depth` tokens per round.

    Args:
        depth: draft tokens per round; None: the drafter's default (`Drafter.depth`).
    """

    depth: int | None = None

    def __post_init__(self) -> None:
        if self.depth is not None:
            check_range("a fixed schedule", self, 0, "; 0 decodes plainly", depth=None)

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        depth = drafter.depth if self.depth is None else self.depth
        return [Budget(min(depth, room), min(depth, room)) for room in rooms]
