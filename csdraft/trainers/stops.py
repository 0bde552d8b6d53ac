"""Why a run stops before its end: numbers that are not finite, or a disk that takes no more. Each is one message."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

__all__ = ["FULL", "NonFinite", "Stopped", "Unwritable", "first_non_finite", "shown", "unwritable", "writing"]

MOST_SHOWN = 20
"""Rows that a message lists."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the OSErrors of a disk that is full."""
DISK = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
"""All that writing may meet; OSErrors of the network have other numbers, or none."""
OF_WRITERS = ("inline_container", "iostream error", "I/O error", "os error")
"""Words in the errors of torch.save and safetensors, which are no OSErrors."""


class Stopped(RuntimeError):
    """A run that cannot go on. The message is all that the user needs: scripts print it and exit with status 1."""


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
    """An error of the disk with the file or folder, what is free there, and the way out."""
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    reason = " ".join(str(error).split())
    if "inline_container" in reason:
        reason = f"torch.save wrote less than it was given ({reason})"
    name = getattr(error, "filename", None) or folder
    return (
        f"{name} cannot be written: {reason}; {free:.2f} GB are free in {place}. "
        "Make room and give the same command again, or give another output_dir; save_total_limit=1 keeps fewer "
        "checkpoints"
    )
