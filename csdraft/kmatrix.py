"""The K matrix of Cascade Speculative Drafting (arXiv 2312.11462): how long each drafter drafts, for each reviewer.

Reviewer 0 is the target, reviewer i is `drafters[i-1]`. Row i describes the cascade that reviewer i reviews, wherever
it appears. Entry j says how many tokens stage j, which drafts with `drafters[j]`, adds. (The paper's k is cumulative;
these are increments, as in its code.)
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.vertical import Vertical
from csdraft.stored import kind_of, shown

__all__ = ["AUTO", "KMatrix", "build", "check_k_matrix", "first_guess", "spread_lenience"]

KMatrix = tuple[tuple[int, ...], ...]
"""The rows of a K matrix."""

AUTO = "auto"
"""In place of a K matrix, it lets the planner choose one at the first call with a target."""


def check_k_matrix(k_matrix: Any, drafters: Sequence[Drafter]) -> KMatrix:
    """The full (n, n) matrix.

    Args:
        k_matrix: all rows; or row 0 alone (all models draft token by token); or one number for all of row 0.
        drafters: largest first.

    Raises:
        ValueError: it does not fit the drafters, is not upper triangular, has an entry that is not a whole number
            >= 0, or drafts nothing.
    """
    n = len(drafters)
    if n == 0:
        raise ValueError("drafters=[]: a cascade needs at least one drafter; leave assistant= out to decode without")
    rows = _rows(k_matrix, n)
    for i, row in enumerate(rows):
        for j, k in enumerate(row):
            if not isinstance(k, Integral) or isinstance(k, bool) or k < 0 or (j < i and k != 0):
                raise ValueError(
                    f"k_matrix[{i}][{j}]={shown(k)}: entries are whole numbers >= 0, and 0 below the diagonal "
                    "(row i is what reviewer i reviews: drafters i and later)"
                )
    if not any(rows[0]):
        raise ValueError(
            f"k_matrix={shown(k_matrix)} drafts nothing: give row 0 a number > 0, or leave assistant= out"
        )
    for j, drafter in enumerate(drafters[:-1]):
        if any(rows[j + 1]) and not isinstance(drafter, ModelDrafter):
            raise ValueError(
                f"k_matrix[{j + 1}]={list(rows[j + 1])} is what drafters[{j}] reviews, but {kind_of(drafter)} "
                "reviews nothing: only models do; make the row zeros"
            )
    return tuple(tuple(int(k) for k in row) for row in rows)


def first_guess(drafters: Sequence[Drafter]) -> KMatrix:
    """The matrix until the planner has chosen one: each drafter drafts a few tokens, and models review nothing."""
    row = tuple(min(drafter.depth, 5) if drafter.models() else drafter.depth for drafter in drafters)
    return row, *((0,) * len(row) for _ in row[1:])


def _rows(k_matrix: Any, n: int) -> list[Sequence[Any]]:
    """All rows of a matrix in one of the forms that users give; their entries are not checked yet."""
    if isinstance(k_matrix, str):
        raise ValueError(
            f"k_matrix={shown(k_matrix)} is not a matrix: give 'auto', or numbers, such as 5, {[5] * n} (tokens per "
            f"drafter), or {n} rows of {n}"
        )
    rows = k_matrix.tolist() if isinstance(k_matrix, np.ndarray | Tensor) else k_matrix
    if isinstance(rows, Real):
        rows = [rows] * n
    if isinstance(rows, Sequence) and all(isinstance(row, Real) for row in rows):
        rows = [rows, *([0] * n for _ in range(n - 1))]
    is_matrix = isinstance(rows, Sequence) and len(rows) == n
    if not is_matrix or not all(isinstance(row, Sequence) and len(row) == n for row in rows):
        raise ValueError(
            f"k_matrix={shown(k_matrix)} does not fit {n} drafters: give {n} rows of {n} numbers, one row, or one "
            "number"
        )
    return list(rows)


def spread_lenience(
    lenience: float | Sequence[float], drafters: Sequence[Drafter], k_matrix: Sequence[Sequence[int]]
) -> list[float]:
    """One number for each drafter: the given numbers for models that review, 1 for all others."""
    reviewing = [j for j in range(len(drafters) - 1) if any(k_matrix[j + 1])]
    given = [lenience] * len(reviewing) if isinstance(lenience, Real) else list(lenience)  # type: ignore[arg-type]
    if len(given) != len(reviewing):
        raise ValueError(
            f"lenience={lenience} has {len(given)} numbers for the {len(reviewing)} drafters that review (whose row "
            "of the k_matrix is not zero); give one each, largest first, or one number for all"
        )
    spread = [1.0] * len(drafters)
    for j, value in zip(reviewing, given, strict=True):
        spread[j] = float(value)
    return spread


def build(
    drafters: Sequence[Drafter], k_matrix: Sequence[Sequence[int]], lenience: Sequence[float], row: int = 0
) -> Horizontal:
    """The horizontal cascade of one row; its models review the cascades of their own rows."""
    stages = list(drafters[row:])
    for j, reviewed in enumerate(k_matrix[row + 1 :], row):
        if isinstance(drafter := drafters[j], ModelDrafter) and any(reviewed):
            stages[j - row] = Vertical(drafter.network, build(drafters, k_matrix, lenience, j + 1), lenience[j])
    return Horizontal(tuple(stages), tuple(k_matrix[row][row:]))
