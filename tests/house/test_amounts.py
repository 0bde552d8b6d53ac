"""Bytes and counts: three digits, and the unit in which they are neither 0.00 nor in the thousands."""

import pytest

from csdraft.amounts import count_text, size_text


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (999_499, "999 KB"), (999_600, "1 MB"), (8.03e9, "8.03 GB"),
     (80 * 2**30, "85.9 GB"), (12_345e12, "12,345 TB")],
)  # fmt: skip
def test_sizes(number, shown):
    assert size_text(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (842, "842"), (33_184, "33.2 k"), (1_163_000, "1.16 M"), (8_030_000_000, "8.03 B")]
)
def test_counts(number, shown):
    assert count_text(number) == shown
