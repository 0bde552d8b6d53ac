"""The check of a lenience, used wherever one is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from csdraft.stored import shown

__all__ = ["check_lenience"]

MOST = 1e9
"""With much less every token passes already; with more, products of float32 probabilities could be infinite."""


def check_lenience(lenience: Any) -> None:
    """Raises ValueError unless it is a number, or a sequence of numbers, from 1 (strict) to `MOST`."""
    several = isinstance(lenience, Iterable) and not isinstance(lenience, str | Mapping)
    given = list(lenience) if several else [lenience]
    numbers: list[Any] = [value for value in given if isinstance(value, Real) and not isinstance(value, bool)]
    if len(numbers) < len(given) or not all(1 <= value <= MOST for value in numbers):
        raise ValueError(
            f"lenience={shown(lenience)} must be 1 (strict) or more, at most {MOST:.0e}; the papers' l <= 1 is "
            "1/lenience"
        )
