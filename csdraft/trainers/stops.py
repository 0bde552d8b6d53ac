"""What ends a training early: numbers that are not finite, a full disk, Ctrl-C, SIGTERM or the end of its launcher.

Errors say what the user can do. A signal stops the training after the current step, with a checkpoint.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from transformers import TrainerCallback

from csdraft.amounts import size_text
from csdraft.data.shards import Part

__all__ = [
    "FULL", "Interrupt", "NonFinite", "Stopped", "Unwritable", "first_non_finite", "shown", "unwritable", "writing",
]  # fmt: skip

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


# Signals.

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0
"""Seconds in which a second signal counts as the same: schedulers signal all processes, and launchers pass it on."""
LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Variables that torchrun or accelerate set for the processes that they start."""
_parent = [os.getppid()]
"""The process that started this one, or forked it (notebook_launcher)."""
os.register_at_fork(after_in_child=lambda: _parent.__setitem__(0, os.getppid()))


class Interrupt(TrainerCallback):
    """Turns the first signal into "save and stop"; a second one has its usual effect.

    accelerate's launcher for one process does not pass signals on: it ends, and its child continues without it. So a
    process whose launcher has ended stops as after SIGTERM. A process started by a shell continues, for nohup.

    Attributes:
        number: of the signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}
        self._since = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a signal was received."""
        return self.number != 0

    @property
    def status(self) -> int:
        """The exit status after a signal: 143 for SIGTERM, 130 for Ctrl-C; 0 without a signal."""
        return 128 + self.number if self.number else 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if not self.stopped:
            if Part.of_environment().rank == 0:
                name = signal.Signals(number).name
                print(f"\n{name}: saving after this step; send it again to stop at once", flush=True)
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self.restore()
            signal.raise_signal(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.stopped and launcher_has_gone():
            self.number, self._since = int(signal.SIGTERM), time.monotonic()
        if args.world_size > 1 and distributed.is_initialized():  # all processes stop when one gets a signal
            asked = torch.tensor(self.number, device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            if asked and not self.number:
                self._since = time.monotonic()  # this process's own signal may come a little later
            self.number = int(asked)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def launcher_has_gone() -> bool:
    """Whether the launcher that started this process has ended."""
    return os.getppid() != _parent[0] and any(name in os.environ for name in LAUNCHER_VARIABLES)
