"""Stops a training after the current step, with a checkpoint, at Ctrl-C, SIGTERM or the end of its launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from csdraft.data.shards import Part

__all__ = ["Interrupt"]

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
