"""What the calls of a drafter, a model or a name came to: kept beside them, so that nothing is set on a user's model.

A drafter or model has its reports as long as it lives; a copy has none of its own, and nothing is saved with either.
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
"""Names and paths whose reports are kept: those that were used last."""


@dataclass
class Reports:
    """All calls so far, and the last of them."""

    total: Report | None = None
    last: Report | None = None

    def add(self, report: Report) -> None:
        self.total = report if self.total is None else self.total.merged(report)
        self.last = report


_LOCK = threading.RLock()  # an owner may go while this thread holds it
_by_object: dict[int, tuple[weakref.ref[Any], Reports]] = {}  # by id: equal drafters have their own
_by_name: dict[str, Reports] = {}
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


def keep(report: Report, *owners: Any) -> None:
    """Adds a finished call's report to those of everything that took part in it, each once."""
    if _silent.get():
        return
    with _LOCK:
        for kept in {id(kept): kept for owner in owners if (kept := _find(owner, make=True)) is not None}.values():
            kept.add(report)


def report_of(owner: Any) -> Report | None:
    """What all calls of a drafter, a model or a name came to; None if it had none."""
    with _LOCK:
        kept = _find(owner)
        return None if kept is None else kept.total


def last_report_of(owner: Any) -> Report | None:
    """The report of its last call; None if it had none."""
    with _LOCK:
        kept = _find(owner)
        return None if kept is None else kept.last


def forget(owner: Any) -> None:
    """Its next call is its first."""
    with _LOCK:
        kept = _find(owner)
        if kept is not None:
            kept.total = kept.last = None


class Reported:
    """What can be an assistant, and has the reports of the calls in which it was."""

    @property
    def report(self) -> Report | None:
        """What all of them so far came to; None before the first."""
        return report_of(self)

    @property
    def last_report(self) -> Report | None:
        """The last one's report; None before the first."""
        return last_report_of(self)

    def reset_report(self) -> None:
        """Forgets them: the next call is the first."""
        forget(self)


@contextmanager
def unreported() -> Iterator[None]:
    """Calls in here, of this thread, are in no report: a planner's trials are not what the user asked for."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _find(owner: Any, make: bool = False) -> Reports | None:
    """The reports of an owner; None if it has none, or is of a kind that cannot have any."""
    if isinstance(owner, str | os.PathLike):
        name = os.fspath(owner)
        kept = _by_name.pop(name, Reports() if make else None)
        if kept is not None:
            _by_name[name] = kept  # the last now
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
    except TypeError:  # None, a dictionary: nothing that could be asked about later
        return None
    made = Reports()
    _by_object[id(owner)] = reference, made
    return made


def _drop(gone: weakref.ref[Any]) -> None:
    """An owner is gone, and its reports go too."""
    with _LOCK:
        for key in [key for key, (reference, _) in _by_object.items() if reference is gone]:
            del _by_object[key]
