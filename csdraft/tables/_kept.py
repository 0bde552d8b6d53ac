"""Tables that the process keeps for each target as long as the target lives and has the same number of tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["kept_for"]

T = TypeVar("T")

_TABLES: WeakKeyDictionary[Any, tuple[int, dict[Hashable, Any]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def kept_for(target: Any, key: Hashable, make: Callable[[], T]) -> T:
    """The target's table of this key, made at its first use, and again when its token embeddings were resized."""
    vocab: int = target.config.get_text_config(decoder=True).vocab_size
    with _LOCK:
        known, tables = _TABLES.setdefault(target, (vocab, {}))
        if known != vocab:
            _, tables = _TABLES[target] = vocab, {}
        if key not in tables:
            tables[key] = make()
        return tables[key]
