"""Only one run writes to a folder: the first process of a run holds a file lock on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from csdraft.data.shards import Part

__all__ = ["only_run"]

LOCK = "_lock"
"""The lock's file in the run's folder. transformers does not upload files whose names begin with _."""


@contextmanager
def only_run(folder: str | None) -> Iterator[None]:
    """Keeps other runs out of a folder while this block runs. The system frees the lock of a killed process.

    Does nothing on other processes than the first of a run, and in folders that cannot be written or locked. A block
    inside such a block may write to the folder too.

    Raises:
        ValueError: another run is writing to the folder.
    """
    file = Path(folder or "").resolve() / LOCK
    with ExitStack() as stack:
        try:
            if Part.of_environment().rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(FileLock(file, blocking=False, is_singleton=True))
                if lock.lock_counter == 1:
                    stack.callback(file.unlink, missing_ok=True)  # before it is unlocked
                    file.write_text(str(os.getpid()), encoding="utf-8")
        except Timeout:
            process = file.read_text(encoding="utf-8").strip()
            raise ValueError(
                f"another run{f' (process {process})' if process else ''} is writing to {file.parent}: wait for it, "
                "end it, or give another output_dir"
            ) from None
        except (OSError, NotImplementedError):
            pass  # no lock here; `check_writable` says why
        yield
