"""What schedules have learned of a drafter: the drafter keeps it, by target, and it dies with either."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from copy import deepcopy
from typing import Any, TypeVar

__all__ = ["Memory"]

T = TypeVar("T")


class Memory:
    """One drafter's memory. Locked: calls may run in several threads, each of which works on a copy of its own.

    Attributes:
        saved: what came with a saved cascade, by kind; see `csdraft.tables.costs`.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._by_target: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

    def load(self, target: Any, key: Hashable, make: Callable[[], T]) -> T:
        """A copy of what was saved last under this key for this target; what `make` makes if nothing was."""
        with self._lock:
            known = self._by_target.get(target, {}).get(key)
            return make() if known is None else deepcopy(known)

    def save(self, target: Any, key: Hashable, learned: Any) -> None:
        """Keeps what a call has learned; it must not be changed afterwards."""
        with self._lock:
            self._by_target.setdefault(target, {})[key] = learned

    def entries(self) -> list[tuple[Any, Hashable, Any]]:
        """(target, key, what was learned) of all targets that are still there."""
        with self._lock:
            return [(t, key, known) for t, kept in self._by_target.items() for key, known in kept.items()]

    def clear(self) -> None:
        """Forgets all of it."""
        with self._lock:
            self._by_target.clear()

    def __reduce__(self) -> tuple[type, tuple]:
        return Memory, ()  # a copied or pickled drafter starts from nothing
