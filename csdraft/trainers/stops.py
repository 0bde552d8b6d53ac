"""Errors that end a run early: numbers that are not finite, or a full disk. Each message says what the user can do."""

from __future__ import annotations

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from csdraft.amounts import size_text

__all__ = ["FULL", "NonFinite", "Stopped", "Unwritable", "first_non_finite", "shown", "unwritable", "writing"]

MOST_SHOWN = 20
"""Rows that a message lists."""
ROOM = (
    "Make room and give the same command again, or give another output_dir; save_total_limit=1 keeps fewer checkpoints"
)
FULL = {
    errno.ENOSPC: ("the disk is full", ROOM),
    errno.EDQUOT: ("your share of the disk (quota) is used up", ROOM),
    errno.EFBIG: (
        "it would be larger than a limit on file size (ulimit -f)",
        "Raise the limit (ulimit -f unlimited) and give the same command again",
    ),
}
"""Error number of a full disk -> reason and way out."""
DISK = {*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
"""Error numbers of the disk. Network errors are OSErrors too, with other numbers or none."""
WRITER_ERRORS = ("inline_container", "iostream error", "I/O error", "os error")
"""Words in the errors of torch.save and safetensors, which are not OSErrors."""
WRITERS = {"save_file": "filename", "save": "f"}
"""Functions of safetensors and torch that write a file, and their argument that names it."""
ALMOST_NOTHING = 10_000_000
"""Bytes: with less than this free, the disk is called full if a writer does not say why it failed."""
BLOCK = 4096
"""Bytes: a file that reached the size limit may lack its last block."""


class Stopped(RuntimeError):
    """The run cannot continue. The message is all the user needs: scripts print it and exit with status 1."""


class NonFinite(Stopped):
    """A loss, a gradient or a weight is nan or infinite."""


class Unwritable(Stopped):
    """A checkpoint or the result cannot be written."""


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a nan or an infinity; None if all are finite."""
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
    return None


def shown(numbers: Sequence[int]) -> str:
    """The first row numbers, and how many more there are."""
    listed = ", ".join(map(str, numbers[:MOST_SHOWN]))
    return f"{listed} and {len(numbers) - MOST_SHOWN} more" if len(numbers) > MOST_SHOWN else listed


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turns an error of the disk into `Unwritable`; see `unwritable` for its message."""
    try:
        yield
    except Stopped:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            ours = error.errno in DISK
        else:
            ours = any(words in str(error) for words in WRITER_ERRORS)
        if not ours:
            raise
        raise Unwritable(unwritable(folder, error)) from error


def unwritable(folder: str | Path, error: Exception) -> str:
    """A message about an error of the disk: the file, the reason, the free space, and the way out.

    Args:
        folder: where the writer wrote; named if the file is not known.
        error: of the writer.
    """
    folder = Path(folder).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    file = Path(getattr(error, "filename", None) or _written(error) or folder)
    number = _number(error, file, free)
    reason = os.strerror(number) if number else "not all of it reached the disk"
    way_out = "Put that right and give the same command again, or give another output_dir"
    if number in FULL:
        reason, way_out = FULL[number]
    return f"{file} cannot be written: {reason}; {size_text(free)} are free in {place}. {way_out}"


def _written(error: Exception) -> str | None:
    """The file that safetensors or torch.save was writing, from the traceback: their errors do not name it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_locals.get(WRITERS.get(frame.f_code.co_name, ""))
        if isinstance(name, str | os.PathLike):
            return os.fspath(name)
    return None


def _number(error: Exception, file: Path, free: int) -> int | None:
    """The OSError number behind a writer's error; None if it is not known.

    safetensors writes the number into its message. For torch.save it is guessed from the size limit and free space.
    """
    if isinstance(error, OSError):
        return error.errno
    if told := re.search(r"os error (\d+)", str(error)):
        return int(told[1])
    if file.is_file() and file.stat().st_size >= _file_size_limit() - BLOCK:
        return errno.EFBIG
    return errno.ENOSPC if free < ALMOST_NOTHING else None


def _file_size_limit() -> float:
    """Bytes that this process may write into one file."""
    try:
        import resource
    except ImportError:  # Windows
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit
