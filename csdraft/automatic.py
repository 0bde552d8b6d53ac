"""The drafter of `generate(..., assistant="auto")`: a target's tables, and a drafter saved beside the target."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
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
"""The folder inside a target's own folder that may hold its drafter."""


def auto_for(target: nn.Module | None, load: Callable[[str, nn.Module], Drafter]) -> Auto:
    """The drafter that this process keeps for a target, with all that it has learned, as long as the target lives.

    A saved drafter is loaded once, and again if the generation config names another or the target's token embeddings
    were resized. One that holds the target itself is loaded for each call, because keeping it would keep the target
    alive.

    Args:
        target: the model; None makes a new drafter, which looks up the tables of its targets itself.
        load: loads a drafter from its path or Hub id, for a target.

    Raises:
        ValueError: there is a saved drafter that cannot be loaded; the message says where it was found.
    """
    if target is None:
        return Auto()
    target = base_model(target)
    found, vocab = _beside(target), vocab_size(target)
    with _LOCK:
        known = _KEPT.get(target)
    if known is not None and known[:2] == (found, vocab):
        return known[2]
    saved = None if found is None else _loaded(*found, target, load)
    if isinstance(saved, Auto):
        made = saved
    else:
        adjacency, outputs = AdjacencyTable.of(target, vocab), OutputTable.of(target)
        made = Auto(adjacency=adjacency, outputs=outputs, drafter=saved)
    if target not in made.models():
        with _LOCK:
            _KEPT[target] = found, vocab, made
    return made


def _beside(target: nn.Module) -> tuple[str, str] | None:
    """Where a target's saved drafter is, and where that is stated; None if it has none."""
    folder = Path(str(getattr(target.config, "_name_or_path", "") or os.devnull))
    named = getattr(getattr(target, "generation_config", None), KEY, None)
    file = folder / "generation_config.json"
    if named is None and file.is_file():  # transformers drops unknown keys if it makes one from a model's config
        named = read_object(file).get(KEY)
    if named is not None:
        if not isinstance(named, str | os.PathLike):
            raise ValueError(f"generation_config.{KEY}={named!r} is {kind_of(named)}; give a path or Hub id, or None")
        inside = folder / named
        return str(inside) if inside.is_dir() else os.fspath(named), f"generation_config.{KEY}={os.fspath(named)!r}"
    if (folder / FOLDER).is_dir():
        return str(folder / FOLDER), f"the folder {FOLDER!r} beside the target's weights"
    if (folder / DOCUMENT).is_file():
        return str(folder), f"{DOCUMENT} beside the target's weights"
    return None


def _loaded(path: str, why: str, target: nn.Module, load: Callable[[str, nn.Module], Drafter]) -> Drafter:
    """Loads a drafter; a saved cascade without its verifier and schedule, since these are the call's."""
    try:
        drafter = load(path, target)
    except (OSError, ValueError) as error:
        raise ValueError(f"{why}: {error}; fix it, remove it, or name the drafter in assistant=") from error
    root = getattr(drafter, "root", drafter)
    lone = root.parts()[0] if len(root.parts()) == 1 else None
    return lone if isinstance(lone, Auto) else root


_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple[str, str] | None, int, Auto]] = WeakKeyDictionary()
_LOCK = threading.Lock()
