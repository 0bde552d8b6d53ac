"""A check of the options of drafters that are made of other drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from csdraft.decoding.interfaces import Drafter
from csdraft.stored import kind_of, shown

__all__ = ["as_list", "check_parts"]

NO_LISTS = str | bytes | bytearray | Mapping | nn.Module | Drafter
"""What is never taken for a list, even if it can be iterated over."""


def as_list(name: str, given: Any, order: str = "") -> tuple:
    """An option that is a list, as a tuple; raises ValueError if it is something else, and says in which `order`."""
    try:
        if not isinstance(given, NO_LISTS):
            return tuple(given)
    except TypeError:
        pass
    raise ValueError(f"{name}={shown(given)} is {kind_of(given)}; give a list, {order}[...]")


def check_parts(owner: Drafter, parts: Sequence[Drafter] | None = None) -> None:
    """Raises ValueError unless each of its parts, or of those given, is a drafter."""
    for part in owner.parts() if parts is None else parts:
        if not isinstance(part, Drafter):
            shown = f"{part!r}" if isinstance(part, str) else kind_of(part)
            raise ValueError(
                f"{type(owner).__name__} got {shown} for a drafter; give an object, such as MaxGram(), or "
                "ModelDrafter(...) around a model or its path (names and paths are for CascadeDrafter and generate)"
            )
