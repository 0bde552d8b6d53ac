"""Errors that end a run early: numbers that are not finite, or a full disk. Each message says what the user can do."""

from __future__ import annotations

import errno
import os
import shutil
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
"""Error numbers of a disk that is full, or of a limit that is reached."""
DISK = {*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
"""Error numbers of the disk. Network errors are OSErrors too, with other numbers or none."""
WRITER_ERRORS = ("inline_container", "iostream error", "I/O error", "os error")
"""Words in the errors of torch.save and safetensors, which are not OSErrors."""


class Stopped(RuntimeError):
    """The run cannot continue. The message tells the user all they need: scripts print it and exit with status 1."""


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
        folder: where the writer wrote; named if the error does not name the file.
        error: of the writer.
    """
    folder = Path(folder).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = size_text(shutil.disk_usage(place).free)
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else f"not all of it reached the disk ({error})"
    return (
        f"{getattr(error, 'filename', None) or folder} cannot be written: {reason}; {free} are free in {place}. Make "
        "room, or raise the limit that was reached, and give the same command again; or give another output_dir. "
        "save_total_limit=1 keeps fewer checkpoints"
    )
