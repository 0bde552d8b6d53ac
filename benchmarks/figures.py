"""From samples to figures: rates, paired ratios with intervals, and whether the text is plain `generate`'s."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import Run
from csdraft.bench import Method, equality, ratio
from csdraft.metrics.intervals import Interval

__all__ = ["Figures", "equal_to", "figures"]


@dataclass(frozen=True)
class Figures:
    """What a table says of one method.

    Attributes:
        tokens_per_second, first_token_ms: medians over prompts and repetitions.
        speedup: tokens a second over the reference's, paired.
        block_efficiency: emitted tokens / rounds over all prompts.
        outside_share: of the time, outside model forwards; peak_mib: the most memory above the start of a call.
        equal: groups of prompts whose text was the reference's in every repetition, of `compared`; None of both if
            the method does not promise equality (transformers' own under sampling).
        different: group numbers with another text.
        acceptance: accepted / tried draft tokens, by level.
    """

    name: str
    tokens: int
    tokens_per_second: float
    first_token_ms: float | None
    speedup: Interval
    block_efficiency: float | None = None
    outside_share: float | None = None
    peak_mib: float | None = None
    equal: int | None = None
    compared: int | None = None
    different: tuple[int, ...] = ()
    acceptance: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup._asdict()}


def figures(run: Run, cell: str, reference: str, equal_to: str | None) -> Figures:
    """One cell's figures.

    Args:
        reference: the cell whose speed counts as 1.
        equal_to: the cell whose text this one must reproduce, if any.
    """
    samples = [s for s in run.samples if s.cell == cell]
    looks = [look for look in run.looks if look.cell == cell]
    firsts = [s.first for s in samples if s.first is not None]
    same, different = (None, ()) if equal_to is None else equality(run.texts, cell, equal_to)
    groups = {s.group for s in samples}
    peaks = [look.peak for look in looks if look.peak is not None]
    seen = {}
    if looks:
        rounds = sum(look.tokens / look.block_efficiency for look in looks)
        seconds = sum(look.seconds for look in looks)
        seen = {
            "block_efficiency": sum(look.tokens for look in looks) / rounds,
            "outside_share": 1 - sum(look.forward_seconds for look in looks) / seconds,
            "peak_mib": max(peaks) / 2**20 if peaks else None,
            "acceptance": _acceptance(run, cell),
        }
    return Figures(
        cell,
        sum(s.tokens for s in samples),
        statistics.median(s.rate for s in samples),
        1000 * statistics.median(firsts) if firsts else None,
        ratio(run, cell, reference),
        equal=same,
        compared=None if same is None else len(groups),
        different=different,
        **seen,
    )


def equal_to(method: Method, greedy: bool, names: list[str], rows: int = 1) -> str | None:
    """The cell whose text a method owes: plain's if greedy; under sampling csdraft's own, which no drafter changes."""
    suffix = "" if rows == 1 else f"@{rows}"
    if greedy:
        return "plain" + suffix
    own = "csdraft_empty" + suffix
    return own if method.drafted and own in names else None


def _acceptance(run: Run, cell: str) -> dict[str, float] | None:
    """Accepted / tried draft tokens under the target, by the level that drafted."""
    reports = [look.report for look in run.looks if look.cell == cell and look.report is not None]
    if not reports:
        return None
    tried: Counter[str] = sum((report.target.tried for report in reports), Counter())
    accepted: Counter[str] = sum((report.target.accepted for report in reports), Counter())
    return {level: accepted[level] / count for level, count in tried.items()}
