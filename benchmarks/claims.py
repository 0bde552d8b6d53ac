"""A sentence about speed that a run must show: its words, the figure, PASS or FAIL."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from csdraft.metrics.intervals import Interval

__all__ = ["Claim"]


@dataclass(frozen=True)
class Claim:
    """One claim and what was measured.

    Attributes:
        words: what is claimed.
        figure: what was measured, to print.
        value: the number that decides.
        bar: what it must reach, or not exceed if `most`.
    """

    words: str
    figure: str
    value: float
    bar: float
    most: bool = False

    @classmethod
    def ratio(cls, words: str, interval: Interval, bar: float, surely: bool = False) -> Claim:
        """The ratio's median is at least the bar; `surely`: the lower end of its interval is."""
        return cls(
            words,
            f"{interval.median:.3f} [{interval.low:.3f}, {interval.high:.3f}] x",
            interval.low if surely else interval.median,
            bar,
        )

    @property
    def passed(self) -> bool:
        return self.value <= self.bar if self.most else self.value >= self.bar

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.words}: {self.figure}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
