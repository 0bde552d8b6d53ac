"""Large numbers as people read them: bytes and counts, with three digits and a decimal unit.

It imports nothing of csdraft, so that every part may use it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count_text", "size_text"]


def size_text(number: float) -> str:
    """Bytes, such as "12.3 MB"."""
    return _scaled(number, ("B", "KB", "MB", "GB", "TB"))


def count_text(number: float) -> str:
    """A count, such as "12.3 M" parameters; B is a billion."""
    return _scaled(number, ("", "k", "M", "B"))


def _scaled(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:.3g} {units[-1]}" if number < 999.5 else f"{number:,.0f} {units[-1]}"
