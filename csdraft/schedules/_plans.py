"""The plans that the cost model compares: how much a draft of each depth is expected to yield and to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from csdraft.schedules._prices import Prices
from csdraft.tables.costs import Way

__all__ = ["MARGIN", "Group", "Plan", "plans_by_depth", "reason"]

MARGIN = 1.02
"""A plan must look this many times faster than plain decoding. With less, timing noise would decide."""


class Plan(NamedTuple):
    """One way and depth to draft, and what a round with it is expected to yield and cost.

    Attributes:
        way: leading stages left out, and size of the tree.
        tokens: expected emitted tokens of a row.
        seconds: for drafting, the target's forward, and a share of reading the text.
        width: tokens of a row in the target's forward.
    """

    way: Way
    depth: int
    tokens: float
    seconds: float
    width: int = 1

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class Group:
    """Rows of a batch with the same evidence, and what their drafts are expected to do.

    Attributes:
        rows: how many rows.
        rates: (depth,) chance that each token is kept, given that those before it were.
        offered: (depth,) chance that the draft has each token.
        alive: chance that all tokens so far are kept.
    """

    rows: int
    rates: list[float]
    offered: list[float]
    alive: float = 1.0


def plans_by_depth(
    way: Way, depths: Sequence[int], groups: Sequence[Group], prices: Prices, reading: float, optimistic: bool = False
) -> list[Plan]:
    """One plan for each depth, made from shallow to deep.

    Each depth adds the tokens that are kept so far, and the seconds to draft and review them. These seconds are
    weighted by the chance that some row's draft gets that deep.

    Args:
        way: leading stages left out, and size of the tree.
        depths: ascending.
        groups: all rows of the batch.
        prices: of forwards and drafted tokens.
        reading: seconds to read text, for each emitted token.
        optimistic: whether forwards that were rarely measured may turn out cheaper.
    """
    plans, tokens, before, rows = [], 1.0, 0, sum(group.rows for group in groups)
    seconds = forward = prices.plain
    widths = prices.widths(way, depths[-1]) if depths else []
    for depth in depths:
        for group in groups:
            for rate in group.rates[before:depth]:
                group.alive *= rate
                tokens += group.alive * group.rows / rows
        nothing_added = prod([(1 - group.offered[depth - 1]) ** group.rows for group in groups])
        drafting = sum([prices.token[prices.stage_of(way.skip, i)] for i in range(before, depth)])
        narrower, forward = forward, prices.forward(1 + widths[depth], optimistic)
        seconds += (1 - nothing_added) * (forward - narrower + drafting)
        plans.append(Plan(way, depth, tokens, seconds + tokens * reading, 1 + widths[depth]))
        before = depth
    return plans


def reason(plans: Sequence[Plan], plain: float) -> str:
    """One sentence on the best of the plans that were compared, and the next deeper one.

    Args:
        plain: seconds of a plain step.
    """

    def yields(plan: Plan) -> str:
        return f"{plan.tokens:.1f} tokens per step at the cost of {plan.seconds / plain:.1f} steps"

    best = max(plans, key=lambda plan: plan.rate)
    if best.rate * plain < MARGIN:
        return f"drafting does not pay: drafts of {best.depth} would give {yields(best)}"
    deeper = next((plan for plan in plans if plan.way == best.way and plan.depth > best.depth), None)
    stages = "stage" if best.way.skip == 1 else f"{best.way.skip} stages"
    left_out = f" without the first {stages}" if best.way.skip else ""
    size = f" in trees of {best.way.size}" if best.way.size else ""
    said = f"drafts of {best.depth}{size}{left_out} pay: {yields(best)}"
    return f"{said}; drafts of {deeper.depth} would give {yields(deeper)}" if deeper else said
