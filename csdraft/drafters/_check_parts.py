"""A check of the options of drafters that are made of other drafters."""

from __future__ import annotations

from csdraft.decoding.interfaces import Drafter
from csdraft.stored import kind_of

__all__ = ["check_parts"]


def check_parts(owner: Drafter) -> None:
    """Raises ValueError unless each of its parts is a drafter."""
    for part in owner.parts():
        if not isinstance(part, Drafter):
            shown = f"{part!r}" if isinstance(part, str) else kind_of(part)
            raise ValueError(
                f"{type(owner).__name__} got {shown} for a drafter; give an object, such as MaxGram(), or "
                "ModelDrafter(...) around a model or its path (names and paths are for CascadeDrafter and generate)"
            )
