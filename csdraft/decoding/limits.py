"""How large the options of a method may be, for those that the room in the text does not bound."""

from __future__ import annotations

from csdraft.stored import shown

__all__ = ["MOST_BRANCHES", "MOST_NODES", "check_range"]

MOST_NODES = 1024
"""Of a draft that branches: more than any paper uses, and what a target reads in one forward."""
MOST_BRANCHES = 256
"""Children of a node, or branches that go on at once."""


def check_range(name: str, options: object, **bounds: tuple[float, float | None]) -> None:
    """Raises ValueError unless each of these options lies in its range, ends included; None is no upper end.

    Args:
        name: what messages call the method, article included.
        options: has the options as attributes.
    """
    for key, (least, most) in bounds.items():
        value = getattr(options, key)
        if not value >= least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{key}={shown(value)} of {name} must be {wanted}")
