"""Heuristic: two more draft tokens after a round that kept all, one fewer after any other.

The rule of transformers' assisted generation (`num_assistant_tokens_schedule="heuristic"`). It is simple, but it never
drafts fewer than one token, even where drafting does not pay. Use it to compare; `cost_model` is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.decoding.limits import check_range

__all__ = ["Heuristic"]


@dataclass(frozen=True)
class Heuristic(Schedule):
    """One depth per row, moved by +2 or -1 after every round.

    Args:
        depth: draft tokens of the first round; None: the drafter's default (`Drafter.depth`).
        most: the largest depth.
    """

    depth: int | None = None
    most: int = 64

    def __post_init__(self) -> None:
        check_range("a heuristic schedule", self, most=None)
        if self.depth is not None:
            check_range("a heuristic schedule", self, depth=self.most)

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return HeuristicRun(self, drafter.depth if self.depth is None else self.depth)


class HeuristicRun(Schedule):
    """The depths of one call; each row has its own."""

    def __init__(self, options: Heuristic, first: int):
        self.options, self.first = options, first
        self.depths: dict[int, int] = {}

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        depths = [self.depths.setdefault(context.row, self.first) for context in contexts]
        return [Budget(min(depth, room), min(depth, room)) for depth, room in zip(depths, rooms, strict=True)]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        for r in rounds:
            depth = self.depths[r.context.row]
            kept_all = r.depth >= depth and r.accepted == r.depth  # a draft shorter than asked for does not count
            self.depths[r.context.row] = min(depth + 2, self.options.most) if kept_all else max(depth - 1, 1)
