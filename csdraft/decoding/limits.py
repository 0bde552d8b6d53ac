"""Limits for options that are not bounded by the room in the text."""

from __future__ import annotations

import math
from numbers import Real

from csdraft.stored import shown

__all__ = ["MOST_BRANCHES", "MOST_NODES", "check_range", "halvings"]

MOST_NODES = 1024
"""The most nodes of a tree: more than any paper uses, and what a target can read in one forward."""
FEWEST_NODES = 4
"""The fewest nodes of a tree that a schedule tries: smaller ones are hardly better than chains."""
MOST_BRANCHES = 256
"""The most children of a node, parallel branches, and other widths."""


def halvings(nodes: int) -> tuple[int, ...]:
    """Tree sizes to choose from, the largest first: all nodes, half, a quarter."""
    return tuple(size for size in (nodes, nodes // 2, nodes // 4) if size >= min(nodes, FEWEST_NODES))


def check_range(name: str, options: object, least: int = 1, way_out: str = "", /, **most: int | None) -> None:
    """Raises ValueError if an option is not a number, is below `least`, or is above its own limit.

    Args:
        name: the method's name in messages, with an article.
        options: the object that has the options as attributes.
        way_out: the end of messages.
        most: option -> its limit; None if there is none.
    """
    for key, limit in most.items():
        value = getattr(options, key)
        largest = math.inf if limit is None else limit
        if not (isinstance(value, Real) and least <= value <= largest):  # type: ignore[operator]
            wanted = f"at least {least}" if limit is None else f"from {least} to {limit}"
            raise ValueError(f"{key}={shown(value)} of {name} must be {wanted}{way_out}")
