"""Keeps the reports of drafters, models and names in a table here, so that no attribute is set on a user's model.

Reports are kept as long as the drafter or model lives. They are not copied with it and not saved.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["Reported", "keep", "last_report_of", "report_of", "unreported"]

MOST_NAMES = 16
"""How many names and paths keep their reports; the one that was drafted with longest ago is dropped."""

_LOCK = threading.Lock()
_kept: dict[int | str, tuple[Report | None, Report | None]] = {}
"""Name, or id of a drafter or model (two may be equal) -> the report of all its calls together, and of the last."""
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


def _key(owner: Any) -> int | str:
    return os.fspath(owner) if isinstance(owner, str | os.PathLike) else id(owner)


def keep(report: Report, *owners: Any) -> None:
    """Adds the report of a finished call to each of its owners, once each."""
    if _silent.get():
        return
    with _LOCK:
        for key, owner in {_key(owner): owner for owner in owners}.items():
            before = _kept.pop(key, None)
            if before is None and not isinstance(key, str):
                try:
                    weakref.finalize(owner, _kept.pop, key, None).atexit = False
                except TypeError:  # such as None or a dict
                    continue
            merged = report if before is None or before[0] is None else before[0].merged(report)
            _kept[key] = merged, report
        for name in [key for key in list(_kept) if isinstance(key, str)][:-MOST_NAMES]:
            del _kept[name]


def report_of(owner: Any) -> Report | None:
    """The merged report of all calls of a drafter, model or name; None if there were none."""
    return _kept.get(_key(owner), (None, None))[0]


def last_report_of(owner: Any) -> Report | None:
    """The report of the last call; None if there was none."""
    return _kept.get(_key(owner), (None, None))[1]


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
        if id(self) in _kept:
            _kept[id(self)] = None, None  # the entry stays, since its finalizer does


@contextmanager
def unreported() -> Iterator[None]:
    """While entered, calls of this thread leave no report: a planner's trials are not the user's calls."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)
