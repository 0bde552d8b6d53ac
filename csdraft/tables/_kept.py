"""Tables that the process keeps for each target as long as the target lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["kept_for"]

T = TypeVar("T")

_TABLES: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def kept_for(target: Any, key: Hashable, make: Callable[[], T]) -> T:
    """The target's table of this key, made at its first use."""
    with _LOCK:
        tables = _TABLES.setdefault(target, {})
        if key not in tables:
            tables[key] = make()
        return tables[key]
