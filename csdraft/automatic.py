"""The drafter of `generate(..., assistant="auto")`: a target's tables, and the drafter that was saved beside it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.auto import Auto
from csdraft.hub import DOCUMENT, vocab_size
from csdraft.models import base_model
from csdraft.stored import kind_of, read_object
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.outputs import OutputTable

__all__ = ["KEY", "auto_for"]

KEY = "csdraft_drafter"
"""The key of a target's generation config that names a drafter, by path or Hub id."""
FOLDER = "drafter"
"""The folder of a drafter in its target's own folder."""


def auto_for(target: nn.Module | None, load: Callable[[str, nn.Module], Drafter]) -> Auto:
    """The drafter that this process keeps for a target, with all that it has learned, until the target is gone.

    The drafter that joins in is loaded once, and again if the generation config names another. One that holds the
    target itself is loaded for each call: whatever holds a target would keep it from going.

    Args:
        target: without one it is a new drafter, which finds the tables of its targets by itself.
        load: what loads a drafter from its path or Hub id, for a target.

    Raises:
        ValueError: there is a drafter, and it cannot be loaded; where it was found is said.
    """
    if target is None:
        return Auto()
    target = base_model(target)
    found = _beside(target)
    with _LOCK:
        known = _KEPT.get(target)
    if known is not None and known[0] == found:
        return known[1]
    joining = None if found is None else _loaded(*found, target, load)
    if isinstance(joining, Auto):
        made = joining
    else:
        tables = AdjacencyTable.of(target, vocab_size(target)), OutputTable.of(target)
        made = Auto(adjacency=tables[0], outputs=tables[1], drafter=joining)
    if target not in made.models():
        with _LOCK:
            _KEPT[target] = found, made
    return made


def _beside(target: nn.Module) -> tuple[str, str] | None:
    """Where a target's drafter is, and who says so; None if it has none."""
    folder = Path(str(getattr(target.config, "_name_or_path", "") or os.devnull))
    if (named := _named(target, folder)) is not None:
        if not isinstance(named, str | os.PathLike):
            raise ValueError(f"generation_config.{KEY}={named!r} is {kind_of(named)}; give a path or Hub id, or None")
        inside = folder / named
        return str(inside) if inside.is_dir() else os.fspath(named), f"generation_config.{KEY}={os.fspath(named)!r}"
    if (folder / FOLDER).is_dir():
        return str(folder / FOLDER), f"the folder {FOLDER!r} beside the target's weights"
    if (folder / DOCUMENT).is_file():
        return str(folder), f"{DOCUMENT} beside the target's weights"
    return None


def _named(target: nn.Module, folder: Path) -> Any:
    """What the generation config says; transformers drops unknown keys of one that it made from a model's config."""
    named, file = getattr(getattr(target, "generation_config", None), KEY, None), folder / "generation_config.json"
    return read_object(file).get(KEY) if named is None and file.is_file() else named


def _loaded(path: str, why: str, target: nn.Module, load: Callable[[str, nn.Module], Drafter]) -> Drafter:
    """The drafter there. Of a saved cascade its drafters alone: verifier and schedule are the call's."""
    try:
        drafter = load(path, target)
    except (OSError, ValueError) as error:
        raise ValueError(f"{why}: {error}; fix it, remove it, or name the drafter in assistant=") from error
    nest = getattr(drafter, "root", drafter)
    lone = nest.parts()[0] if len(nest.parts()) == 1 else None
    return lone if isinstance(lone, Auto) else nest


_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple[str, str] | None, Auto]] = WeakKeyDictionary()
_LOCK = threading.Lock()
