"""Why a run stops before its end: numbers that are not finite, or a disk that takes no more. Each is one message."""

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
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the OSErrors of a disk that is full."""
DISK = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
"""All that writing may meet; OSErrors of the network have other numbers, or none."""
OF_WRITERS = ("inline_container", "iostream error", "I/O error", "os error")
"""Words in the errors of torch.save and safetensors, which are no OSErrors."""
WRITERS = {"save_file": "filename", "save": "f"}
"""Functions of safetensors and torch that write a file, and their argument that names it."""
ALMOST_NOTHING = 10_000_000
"""Bytes: where fewer are free, a writer that does not say why it failed has met a full disk."""
BLOCK = 4096
"""Bytes: a file that a limit has cut may lack its last block."""
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk (quota) is used up",
    errno.EFBIG: "it would be larger than a limit on file size (ulimit -f)",
}
"""Number of an OSError -> reason."""
ROOM = (
    "Make room and give the same command again, or give another output_dir; save_total_limit=1 keeps fewer checkpoints"
)
WAYS_OUT = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "Raise the limit (ulimit -f unlimited) and give the same command again",
}


class Stopped(RuntimeError):
    """A run that cannot continue. The message is all that the user needs: scripts print it and exit with status 1."""


class NonFinite(Stopped):
    """A loss, a gradient or a weight is nan or infinite."""


class Unwritable(Stopped):
    """A checkpoint, or the result, cannot be written."""


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a nan or an infinity; None if all are finite."""
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
    return None


def shown(numbers: Sequence[int]) -> str:
    """Numbers of rows in words."""
    listed = ", ".join(map(str, numbers[:MOST_SHOWN]))
    return f"{listed} and {len(numbers) - MOST_SHOWN} more" if len(numbers) > MOST_SHOWN else listed


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """While entered, an error of the disk becomes an `Unwritable` with the folder, what is free, and the way out."""
    try:
        yield
    except Stopped:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        raise Unwritable(unwritable(folder, error)) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK
    return any(words in str(error) for words in OF_WRITERS)


def unwritable(folder: str | Path, error: Exception) -> str:
    """An error of the disk: the file as far as it is known, else the folder; the reason; what is free; the way out.

    Args:
        folder: that was written to.
        error: of the writer.
    """
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    name = Path(getattr(error, "filename", None) or _written(error) or folder)
    number = _number(error, name, free)
    reason = REASONS.get(number or 0) or (os.strerror(number) if number else "not all of it reached the disk")
    way_out = WAYS_OUT.get(number or 0, "Put that right and give the same command again, or give another output_dir")
    return f"{name} cannot be written: {reason}; {size_text(free)} are free in {place}. {way_out}"


def _written(error: Exception) -> str | None:
    """The file that safetensors or torch.save was given: their errors do not name it, and safetensors removes it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_locals.get(WRITERS.get(frame.f_code.co_name, ""))
        if isinstance(name, str | os.PathLike):
            return os.fspath(name)
    return None


def _number(error: Exception, name: Path, free: int) -> int | None:
    """The number of the OSError that a writer has met; None if nothing tells.

    safetensors writes the number into its message. torch.save does not know it: the limit on file size and what is
    free tell.
    """
    if isinstance(error, OSError):
        return error.errno
    if told := re.search(r"os error (\d+)", str(error)):
        return int(told[1])
    limit = _file_size_limit()
    if limit is not None and name.is_file() and name.stat().st_size >= limit - BLOCK:
        return errno.EFBIG
    return errno.ENOSPC if free < ALMOST_NOTHING else None


def _file_size_limit() -> int | None:
    """Bytes that a file of this process may have at most; None if there is no limit."""
    try:
        import resource
    except ImportError:  # no Unix
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
