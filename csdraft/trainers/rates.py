"""A learning rate for each kind of student, for runs that give none.

They are where published recipes start, for models of 0.1 B parameters and more; docs/distilling.md says which recipes.
Smaller models want more: those of `recipes/smol`, 20 and 90 times smaller, 0.001 to 0.004.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csdraft.heads.self_draft import HEAD, SELF_DRAFT, TIED, read_document

__all__ = ["RATES", "is_shared", "kind_of"]

RATES = {"whole": 2e-5, "cut": 1e-4, "scratch": 3e-4, "lora": 2e-4, "self_draft": 4e-4, "head": 3e-4}
"""Kind of student -> learning rate."""


def is_shared(init: Mapping[str, Any] | None) -> bool:
    """Whether `init` asks for a student on the target's own layers: self-drafting."""
    cut = (init or {}).get("from_target")
    return isinstance(cut, Mapping) and bool(cut.get("shared"))


def kind_of(student: Any, init: Mapping[str, Any] | None, peft: Mapping[str, Any] | None) -> str:
    """The kind of student that these keys make: a key of `RATES`. A Hub id is taken for a whole model."""
    if is_shared(init):
        return "self_draft"
    if peft is not None:
        return "lora"
    if init is not None:
        return "scratch" if "config" in init else "cut" if "from_target" in init else "head"
    if student is None or not Path(student).is_dir():
        return "whole"
    kind = (read_document(str(student)) or {}).get("kind")
    adapter = Path(student, "adapter_config.json").is_file()
    by_document = {SELF_DRAFT: "self_draft", TIED: "cut", HEAD: "head"}
    return by_document.get(kind, "lora" if adapter else "whole")  # type: ignore[arg-type]
