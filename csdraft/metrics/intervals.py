"""Medians and ratios with bootstrap intervals over prompts and their repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap_median", "bootstrap_ratio"]

DRAWS = 4000
"""Bootstrap samples."""


class Interval(NamedTuple):
    """A median (from `bootstrap_ratio`, a ratio) and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_median(values: Sequence[Sequence[float]]) -> Interval:
    """The median of all values, and its interval. Draws prompts with replacement, then repetitions of each prompt.

    Repetitions of one prompt are similar, so drawing single values would make the interval too narrow.

    Args:
        values: (prompts, repetitions), with equally many repetitions of each prompt.
    """
    table = np.asarray(values, dtype=float)  # (prompts, repetitions)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"values has shape {table.shape}; give as many repetitions for each prompt, at least one")
    prompts, repetitions = table.shape
    generator = np.random.default_rng(0)
    rows = generator.integers(prompts, size=(DRAWS, prompts, 1))  # indexed below: (draws, prompts, repetitions)
    columns = generator.integers(repetitions, size=(DRAWS, prompts, repetitions))
    medians = np.median(table[rows, columns].reshape(DRAWS, -1), axis=1)  # (draws,)
    return _interval(np.median(table), medians)


def bootstrap_ratio(parts: Sequence[float], wholes: Sequence[float]) -> Interval:
    """Sum of parts / sum of wholes, and its interval. Draws prompts, each with its part and its whole."""
    pairs = np.asarray([parts, wholes], dtype=float)  # (2, prompts)
    chosen = np.random.default_rng(0).integers(pairs.shape[1], size=(DRAWS, pairs.shape[1]))
    sums = pairs[:, chosen].sum(axis=2)  # (2, draws)
    return _interval(pairs[0].sum() / pairs[1].sum(), sums[0] / sums[1])


def _interval(value: float, samples: np.ndarray) -> Interval:
    """The value, and the quantiles of (draws,) bootstrap samples."""
    low, high = np.quantile(samples, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))
