"""Only one run writes to a folder: the first process of a run holds a file lock on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from csdraft.data.shards import Part

__all__ = ["only_run"]

LOCK = "_lock"
"""The lock's file in the run's folder. transformers does not upload files whose names begin with _."""


@contextmanager
def only_run(folder: str | None) -> Iterator[None]:
    """Keeps other processes out of this block for the same folder. The system frees the lock of a killed process.

    The same process may enter again. Does nothing on other processes than the first of a run, and in folders that
    cannot be written or locked.

    Raises:
        ValueError: another run is writing to the folder.
    """
    file = Path(folder or "").resolve() / LOCK
    lock = FileLock(file, blocking=False, is_singleton=True)
    try:
        locked = Part.of_environment().rank == 0 and _acquire(lock, file)
    except Timeout:
        process = file.read_text(encoding="utf-8").strip()
        raise ValueError(
            f"another run{f' (process {process})' if process else ''} is writing to {file.parent}: wait for it, end "
            "it, or give another output_dir"
        ) from None
    try:
        yield
    finally:
        if locked:
            if lock.lock_counter == 1:
                with suppress(OSError):
                    file.unlink()  # while it is locked: another process that has opened it then makes a new one
            lock.release()


def _acquire(lock: FileLock, file: Path) -> bool:
    """Locks the file and writes this process's number into it; False where that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):  # `check_writable` says why
        return False
    with suppress(OSError):
        file.write_text(str(os.getpid()), encoding="utf-8")
    return True
