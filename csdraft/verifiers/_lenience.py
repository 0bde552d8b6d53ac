"""The check of a lenience, used wherever one is given."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from csdraft.stored import shown

__all__ = ["check_lenience"]

MOST = 1e9
"""Every token passes long before this; above it, products of float32 probabilities could be infinite."""


def check_lenience(lenience: Any) -> None:
    """Raises ValueError unless it is a number, or several numbers, from 1 (strict) to `MOST`."""
    given = lenience if isinstance(lenience, Iterable) else [lenience]
    if not all(isinstance(value, Real) and not isinstance(value, bool) and 1 <= value <= MOST for value in given):  # type: ignore[operator]
        raise ValueError(
            f"lenience={shown(lenience)} must be 1 (strict) or more, at most {MOST:.0e}; the papers' l <= 1 is "
            "1/lenience"
        )
