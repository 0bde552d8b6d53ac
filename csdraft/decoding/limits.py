"""How large options may be: the room in the text bounds what is asked for in tokens, these limits all else."""

from __future__ import annotations

from csdraft.stored import shown

__all__ = ["MOST_BRANCHES", "MOST_NODES", "check_range", "halvings"]

MOST_NODES = 1024
"""Of a draft that branches: more than any paper uses, and what a target reads in one forward."""
FEWEST_NODES = 4
"""Smaller trees are hardly better than chains."""
MOST_BRANCHES = 256
"""Children of a node, branches that continue at once, and other widths."""


def halvings(nodes: int) -> tuple[int, ...]:
    """Sizes of tree to choose among, most first: so many nodes, half of them, a quarter."""
    return tuple(size for size in (nodes, nodes // 2, nodes // 4) if size >= min(nodes, FEWEST_NODES))


def check_range(name: str, options: object, least: int = 1, **most: int | None) -> None:
    """Raises ValueError unless these options, whole numbers, are at least `least` and at most what is said of each.

    Args:
        name: what messages call the method, article included.
        options: has the options as attributes.
        most: None where there is no largest.
    """
    for key, limit in most.items():
        value = getattr(options, key)
        if not value >= least or (limit is not None and value > limit):
            wanted = f"at least {least}" if limit is None else f"from {least} to {limit}"
            raise ValueError(f"{key}={shown(value)} of {name} must be {wanted}")
