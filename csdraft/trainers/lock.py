"""Only one run writes to a folder: the first process of a run holds a lock of the operating system on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csdraft.data.shards import Part

__all__ = ["only_run"]

LOCK = "_lock"
"""In the run's folder. transformers does not upload files whose names begin with _."""
HELD: set[Path] = set()
"""Folders that this process has locked."""


@contextmanager
def only_run(folder: str | None) -> Iterator[None]:
    """While entered, no other process can enter for this folder. The system frees it if this process is killed.

    Does nothing on other processes than the first of a run, in a folder that cannot be written, on file systems
    without locks, and on Windows.

    Raises:
        ValueError: another run is writing there.
    """
    path = Path(folder or "").resolve()
    if path in HELD or Part.of_environment().rank != 0 or importlib.util.find_spec("fcntl") is None:
        yield
        return
    lock = _locked(path)
    if lock is None:
        yield
        return
    HELD.add(path)
    try:
        yield
    finally:
        HELD.discard(path)
        (path / LOCK).unlink(missing_ok=True)  # while it is still locked: see `_locked`
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """The descriptor of the locked file, with this process's number in it; None where that cannot be done."""
    import fcntl

    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # `check_writable` says why
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.read(lock, 100).decode(errors="replace").strip()
            os.close(lock)
            raise ValueError(
                f"another run{f' (process {process})' if process else ''} is writing to {folder}: wait for it, "
                "end it, or give another output_dir"
            ) from None
        except OSError:  # the file system has no locks
            os.close(lock)
            return None
        if _is_there(lock, folder / LOCK):
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            return lock
        os.close(lock)  # a run that has just ended has removed the file


def _is_there(lock: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
