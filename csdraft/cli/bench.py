"""Measure speed side by side with plain generate (arguments: csdraft bench --help)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str]) -> int | None:
    """Hands its arguments to the benchmark."""
    from csdraft import benchmark

    return benchmark.main(argv)
