"""Ctrl-C and SIGTERM end a training run after its step, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

__all__ = ["Interrupt"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0
"""Seconds in which another signal is the same one: a scheduler sends it to all, and the launcher passes it on."""


class Interrupt(TrainerCallback):
    """Turns the first signal into "save and stop"; a second one acts as it always did.

    Attributes:
        stopped: whether the run was ended by a signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if not self.stopped:
            print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once", flush=True)
            self.stopped, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self.restore()
            signal.raise_signal(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and distributed.is_initialized():  # one process's signal is everybody's
            asked = torch.tensor(int(self.stopped), device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self.stopped = bool(asked)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
