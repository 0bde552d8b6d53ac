"""The expected gain of a cascade in theory, from acceptance rates and costs.

Cascade Speculative Drafting (arXiv 2312.11462, theorems 4.1, 4.3 and 4.5) assumes that all tokens of a drafter are
accepted independently at one rate. A distribution over token counts is an array of probabilities, the coefficients of
a generating function; drafting and reviewing are operations on such arrays. Use it for questions like "would a third
model pay?". `csdraft tune` replays real texts instead, where acceptances are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Stage", "expected_round", "improvement"]

Counts = np.ndarray
"""(n,) probability of 0, 1, ... n - 1 tokens."""


@dataclass(frozen=True)
class Stage:
    """One stage of a horizontal cascade, as its reviewer sees it.

    Args:
        acceptance: the chance that a token is accepted, given that those before it were.
        length: tokens that it adds; a stage that reviews drafts until it has at least this many.
        cost: the time of one of its forwards (or proposals, if it has no model), in forwards of the target.
        reviews: the cascade that it reviews; empty: it drafts token by token.
        proposes: whether one proposal has all `length` tokens, as with statistical drafters.
    """

    acceptance: float
    length: int
    cost: float = 0.0
    reviews: tuple[Stage, ...] = ()
    proposes: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1 or self.length < 0 or self.cost < 0:
            raise ValueError(f"{self} needs an acceptance in [0, 1], and a length and cost of 0 or more")


def improvement(stages: Sequence[Stage], widening: float = 0.0) -> float:
    """Expected speed-up: plain decoding's time over the cascade's.

    Args:
        stages: the cascade that the target reviews.
        widening: cost of each drafted token in the target's forward, as a share of the forward; 0 in the paper.
    """
    counts, cost, drafted = expected_round(stages)
    return mean(counts) / (1 + cost + widening * drafted)


def expected_round(stages: Sequence[Stage]) -> tuple[Counts, float, float]:
    """One round of a reviewer: distribution of its emitted tokens, cost of drafting, mean number of drafted tokens."""
    alive, dead, cost, drafted = np.ones(1), np.zeros(1), 0.0, 0.0  # Counts: all accepted so far; rejected before
    for stage in stages:
        lengths, price = drafts(stage)
        fates = np.arange(len(lengths))
        longer = lengths[::-1].cumsum()[::-1]  # P(length >= i)
        survive = lengths * stage.acceptance**fates
        die = np.append(longer[1:], 0.0) * stage.acceptance**fates * (1 - stage.acceptance)
        dead, alive = added(dead, np.convolve(alive, die)), np.convolve(alive, survive)
        cost, drafted = cost + price, drafted + mean(lengths)
    return np.append(0.0, added(dead, alive)), cost, drafted  # one more: the reviewer's own token


def drafts(stage: Stage) -> tuple[Counts, float]:
    """Distribution of the number of tokens that a stage drafts, and the mean cost."""
    exact = np.zeros(stage.length + 1)  # Counts
    exact[stage.length] = 1.0
    if not stage.reviews:
        return exact, stage.cost * (min(stage.length, 1) if stage.proposes else stage.length)
    gained, cost, _ = expected_round(stage.reviews)
    waiting, done, rounds = np.ones(1), np.zeros(1), 0.0
    while waiting.sum() > 1e-12 and stage.length:  # every round gives a token, so this ends
        rounds += waiting.sum()
        after = np.convolve(waiting, gained)
        enough = after.copy()
        enough[: stage.length] = 0.0
        done, waiting = added(done, enough), after[: stage.length]
    return (done if stage.length else exact), rounds * (stage.cost + cost)


def mean(counts: Counts) -> float:
    return float(counts @ np.arange(len(counts)))


def added(a: Counts, b: Counts) -> Counts:
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))
