"""Keeps the reports of drafters, models and names in tables here, so that no attribute is set on a user's model.

Reports are kept as long as the drafter or model lives. They are not copied with it and not saved.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["Reported", "forget", "keep", "last_report_of", "report_of", "unreported"]

MOST_NAMES = 16
"""How many names and paths keep their reports; the least recently used is dropped."""


@dataclass
class Reports:
    """All calls together, and the last one."""

    total: Report | None = None
    last: Report | None = None

    def add(self, report: Report) -> None:
        self.total = report if self.total is None else self.total.merged(report)
        self.last = report


_LOCK = threading.RLock()  # reentrant: an owner may be freed while this thread holds it
_by_object: dict[int, tuple[weakref.ref[Any], Reports]] = {}  # by id, since two drafters may be equal
_by_name: dict[str, Reports] = {}
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


def keep(report: Report, *owners: Any) -> None:
    """Adds the report of a finished call to each of its owners, once each."""
    if _silent.get():
        return
    with _LOCK:
        for kept in {id(kept): kept for owner in owners if (kept := _find(owner, make=True)) is not None}.values():
            kept.add(report)


def report_of(owner: Any) -> Report | None:
    """The merged report of all calls of a drafter, model or name; None if there were none."""
    with _LOCK:
        kept = _find(owner)
        return None if kept is None else kept.total


def last_report_of(owner: Any) -> Report | None:
    """The report of the last call; None if there was none."""
    with _LOCK:
        kept = _find(owner)
        return None if kept is None else kept.last


def forget(owner: Any) -> None:
    """Drops an owner's reports."""
    with _LOCK:
        kept = _find(owner)
        if kept is not None:
            kept.total = kept.last = None


class Reported:
    """Base class of what can be an assistant: gives access to the reports of its calls."""

    @property
    def report(self) -> Report | None:
        """The merged report of all calls so far; None before the first."""
        return report_of(self)

    @property
    def last_report(self) -> Report | None:
        """The report of the last call; None before the first."""
        return last_report_of(self)

    def reset_report(self) -> None:
        """Drops all reports."""
        forget(self)


@contextmanager
def unreported() -> Iterator[None]:
    """While entered, calls of this thread leave no report: a planner's trials are not the user's calls."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _find(owner: Any, make: bool = False) -> Reports | None:
    """The reports of an owner; None if it has none, or cannot be weakly referenced.

    Args:
        make: whether to add an empty entry if there is none.
    """
    if isinstance(owner, str | os.PathLike):
        name = os.fspath(owner)
        kept = _by_name.pop(name, Reports() if make else None)
        if kept is not None:
            _by_name[name] = kept  # moves it to the end
            if len(_by_name) > MOST_NAMES:
                del _by_name[next(iter(_by_name))]
        return kept
    known = _by_object.get(id(owner))
    if known is not None and known[0]() is owner:
        return known[1]
    if not make:
        return None
    try:
        reference = weakref.ref(owner, _drop)
    except TypeError:  # such as None or a dict
        return None
    made = Reports()
    _by_object[id(owner)] = reference, made
    return made


def _drop(gone: weakref.ref[Any]) -> None:
    """Called when an owner is freed: drops its reports."""
    with _LOCK:
        for key in [key for key, (reference, _) in _by_object.items() if reference is gone]:
            del _by_object[key]
