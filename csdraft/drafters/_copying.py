"""Shared by drafters that copy text: the evidence of a match, and where a copy ends."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["match_evidence", "until"]

LONG_MATCHES = (2, 4, 8)
"""A match that reaches another of these lengths is the next kind of evidence."""


def match_evidence(matched: int, least: int = 1) -> int:
    """`Drafter.evidence` for a match of `matched` tokens; 0 if it is empty or shorter than `least`."""
    return 0 if matched < max(least, 1) else 1 + sum(matched >= length for length in LONG_MATCHES)


def until(ends: frozenset[int], tokens: Sequence[int]) -> Sequence[int]:
    """The tokens up to and including the first one that ends a text."""
    if ends.isdisjoint(tokens):
        return tokens
    return tokens[: 1 + next(i for i, token in enumerate(tokens) if token in ends)]
