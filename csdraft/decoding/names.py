"""Short names of models and drafters for reports and messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["distinct", "name_of"]


def name_of(owner: object) -> str:
    """A model's last path component, or its class if it has no path; a drafter's class; a string unchanged."""
    if isinstance(owner, str):
        return owner
    path = getattr(getattr(owner, "config", None), "_name_or_path", "")
    return str(path).rstrip("/").rsplit("/", 1)[-1] or type(owner).__name__


def distinct(names: Iterable[str]) -> list[str]:
    """The same names, with numbers added to repeated ones: a, b, a 2."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result
