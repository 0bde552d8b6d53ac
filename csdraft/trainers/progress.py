"""One line while a drafter is trained: step, loss, speed, memory, last evaluation, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from csdraft.amounts import size_text
from csdraft.progress import Progress
from csdraft.trainers.base import BaseTrainer

__all__ = ["Line"]

EVALUATED = {
    "eval_acceptance": "expected acceptance {:.2f}",
    "eval_block_efficiency": "block efficiency {:.2f}",
    "eval_block_efficiency_sampled": "sampled {:.2f}",
}
WINDOW = 20
"""Steps over which the speed is averaged."""


class Line(TrainerCallback):
    """Shows every step with its own loss; the figures of an evaluation stay until the next one.

    The last line is shown once, when the last figures are known.

    Args:
        trainer: whose steps are shown.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer, self.progress = trainer, Progress()
        self.evaluated: dict[str, str] = {}
        self.past: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens of each step
        self._since = time.monotonic()

    @classmethod
    def instead_of_others(cls, trainer: BaseTrainer) -> None:
        """Replaces the progress bar and printed logs of transformers."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(trainer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.restart(state.global_step / max(state.max_steps, 1))
        self.past.clear()
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.past.append((now - self._since, self.trainer.steps.tokens * args.world_size))
        self._since = now
        self._show_unless_last(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.evaluated |= {name: text.format(metrics[name]) for name, text in EVALUATED.items() if name in metrics}
        self._since = time.monotonic()  # the time of an evaluation does not count
        self._show_unless_last(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state, self.progress.finish)

    def _show_unless_last(self, state: Any) -> None:
        if state.global_step < state.max_steps:
            self._show(state, self.progress)

    def _show(self, state: Any, show: Callable[[str, float], None]) -> None:
        if state.is_world_process_zero and state.max_steps:
            figures = ", ".join([*self._step_figures(), *self.evaluated.values()])
            show(f"step {state.global_step}{figures and ': '}{figures}", state.global_step / state.max_steps)

    def _step_figures(self) -> list[str]:
        """The last step's loss, the speed of the last steps, and the memory in use."""
        if not self.past:
            return []
        seconds, tokens = (sum(values) for values in zip(*self.past, strict=True))
        each = seconds / len(self.past)
        return [
            f"loss {self.trainer.steps.loss:.3f}",
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s",
            f"{each:.2f} s a step" if each < 100 else f"{each:.0f} s a step",
            _memory(self.trainer.args.device),
        ]


def _memory(device: torch.device) -> str:
    """The peak of the GPU's allocated memory, or what the process holds now."""
    if device.type == "cuda":
        return f"{size_text(torch.cuda.max_memory_allocated(device))} on the GPU"
    return f"{size_text(psutil.Process().memory_info().rss)} of memory"
