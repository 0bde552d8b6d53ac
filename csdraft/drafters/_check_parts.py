"""A check of the options of drafters that are made of other drafters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from csdraft.decoding.interfaces import Drafter
from csdraft.stored import kind_of, shown

__all__ = ["as_list", "check_parts"]


def as_list(name: str, given: Any, order: str = "") -> tuple:
    """An option that is a list, as a tuple; raises ValueError if it is something else, and says in which `order`."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ValueError(f"{name}={shown(given)} is {kind_of(given)}; give a list, {order}[...]")
    return tuple(given)


def check_parts(owner: Drafter, parts: Sequence[Drafter] | None = None) -> None:
    """Raises ValueError unless each of its parts, or of those given, is a drafter."""
    for part in owner.parts() if parts is None else parts:
        if not isinstance(part, Drafter):
            shown = f"{part!r}" if isinstance(part, str) else kind_of(part)
            raise ValueError(
                f"{type(owner).__name__} got {shown} for a drafter; give an object, such as MaxGram(), or "
                "ModelDrafter(...) around a model or its path (names and paths are for CascadeDrafter and generate)"
            )
