"""What schedules have learned about a drafter, by target. It is freed with the drafter or the target."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from copy import deepcopy
from typing import Any, TypeVar

__all__ = ["Memory"]

T = TypeVar("T")


class Memory:
    """One drafter's memory. Calls may run in several threads; each works on its own copy.

    Attributes:
        saved: what was loaded with a saved cascade, by kind; see `csdraft.tables.costs`.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._by_target: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

    def load(self, target: Any, key: Hashable, make: Callable[[], T]) -> T:
        """A copy of what was last saved for this target and key; the result of `make` if there is nothing."""
        with self._lock:
            known = self._by_target.get(target, {}).get(key)
            return make() if known is None else deepcopy(known)

    def save(self, target: Any, key: Hashable, learned: Any) -> None:
        """Keeps what a call has learned; the caller must not change it afterwards."""
        with self._lock:
            self._by_target.setdefault(target, {})[key] = learned

    def entries(self) -> list[tuple[Any, Hashable, Any]]:
        """(target, key, what was learned) for all targets that still exist."""
        with self._lock:
            return [(t, key, known) for t, kept in self._by_target.items() for key, known in kept.items()]

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._by_target.clear()

    def __reduce__(self) -> tuple[type, tuple]:
        return Memory, ()  # a copied or pickled drafter starts with an empty memory
