"""Bandit: plays the arm with the most tokens per second, and sometimes tries others; an arm is a way to draft.

After BanditSpec (arXiv 2505.15141), whose arms are drafters and whose rule is UCB. Here an arm is a depth and a number
of leading stages of a cascade to leave out (`Budget.skip`). Drafting nothing is an arm too. An arm's reward is the
tokens of its rounds over their seconds. Its bonus is the discounted UCB of Garivier and Moulines (arXiv 0805.3415),
since texts change. It assumes nothing about costs or acceptance, so it needs more rounds than `cost_model`. Use it
where that model is wrong, for example for drafters that take the same time at any depth, and for long texts or many
calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.schedules._prices import UNREAD, unread

__all__ = ["Bandit"]


@dataclass(frozen=True)
class Bandit(Schedule):
    """Plays the arm with the highest upper bound on tokens per second.

    Args:
        depths: draft tokens per round; each depth with each number of leading stages to leave out is an arm.
        exploration: weight of the bonus for arms with few rounds, in units of the best arm's tokens per second.
        memory: about how many rounds count: every new round multiplies the older ones by 1 - 1 / memory.
        remember: whether calls learn from the drafter's earlier calls with the same target.
    """

    depths: tuple[int, ...] = (2, 5, 10)
    exploration: float = 0.1
    memory: float = 50.0
    remember: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} must be one or more numbers >= 1; drafting nothing is always an arm"
            )
        if self.exploration < 0 or not self.memory > 1:
            raise ValueError(
                f"exploration={self.exploration}, memory={self.memory}: expected exploration >= 0 and memory > 1"
            )

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return BanditRun(self, call, drafter)


@dataclass
class Arm:
    """Sums over the rounds of one arm, in which older rounds count less."""

    rounds: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0


Arms = dict[tuple[int, int], Arm]


class BanditRun(Schedule):
    """One call's bandit."""

    def __init__(self, options: Bandit, call: Call, drafter: Drafter):
        self.options, self.call, self.drafter = options, call, drafter
        self.key = (options, call.rows, call.sampler.greedy, call.chooser.processing.temperature)
        known: Arms = drafter.memory.load(call.target, self.key, dict) if options.remember else {}
        self.stages = drafter.stages()
        most = self.stages[-1][1] if len(self.stages) > 1 else max(options.depths)
        depths = sorted({min(depth, most) for depth in options.depths} - {0})
        pairs = [*((skip, depth) for skip in range(len(self.stages)) for depth in depths), (0, 0)]
        self.arms = {pair: known.get(pair, Arm()) for pair in pairs}
        self.playing, self.rounds, self.counts = pairs[0], 0, False

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        skip, depth = self.playing = self._choose()
        drafting = self.stages[skip:] if depth else []
        # The first round also reads the prompt, a text near its end cuts drafts short, and models may have much to
        # read: such rounds are not typical.
        self.counts = self.rounds > 0 and min(rooms) >= depth and unread(self.call, drafting, contexts) <= UNREAD
        return [Budget(min(depth, room), min(depth, room), skip=skip) for room in rooms]

    def _choose(self) -> tuple[int, int]:
        """An arm that was never played, or else the arm with the highest upper bound."""
        for pair, arm in self.arms.items():
            if not arm.rounds:
                return pair
        total = sum(arm.rounds for arm in self.arms.values())
        best = max(arm.tokens / arm.seconds for arm in self.arms.values())

        def bound(pair: tuple[int, int]) -> float:
            arm = self.arms[pair]
            bonus = math.sqrt(max(math.log(total), 0.0) / arm.rounds)
            return arm.tokens / arm.seconds + self.options.exploration * best * bonus

        return max(self.arms, key=bound)

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self.rounds += 1
        if not self.counts:
            return
        faded = 1 - 1 / self.options.memory
        for arm in self.arms.values():
            arm.rounds *= faded
            arm.tokens *= faded
            arm.seconds *= faded
        arm = self.arms[self.playing]
        arm.rounds += 1
        arm.tokens += sum(len(finished.tokens) for finished in rounds) / len(rounds)
        arm.seconds += draft_seconds + score_seconds

    def finish(self) -> None:
        if self.options.remember:
            self.drafter.memory.save(self.call.target, self.key, self.arms)
