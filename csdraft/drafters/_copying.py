"""What drafters that copy have in common: how telling a match is, and where a copy ends."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["match_evidence", "until"]

LONG_MATCHES = (2, 4, 8)
"""Matches of at least so many tokens are evidence of their own kinds."""


def match_evidence(matched: int, least: int = 1) -> int:
    """`Drafter.evidence` for a match of so many tokens; 0 if it is shorter than `least`, or nothing."""
    return 0 if matched < max(least, 1) else 1 + sum(matched >= length for length in LONG_MATCHES)


def until(ends: frozenset[int], tokens: Sequence[int]) -> Sequence[int]:
    """The tokens up to the first that ends a text, that one included."""
    if ends.isdisjoint(tokens):
        return tokens
    return tokens[: 1 + next(i for i, token in enumerate(tokens) if token in ends)]
