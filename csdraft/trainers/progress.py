"""One line while a drafter is trained: step, loss, speed, memory, the last evaluation, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
PROCESS = Path("/proc/self/status")


class Line(TrainerCallback):
    """Shows every step with its own loss; the figures of an evaluation stay until the next.

    The last line is shown once, when the last figures are known.

    Args:
        trainer: whose steps are shown.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer, self.progress = trainer, Progress()
        self.evaluated: dict[str, float] = {}
        self.past: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens of each step
        self._since = time.monotonic()

    @classmethod
    def instead_of_others(cls, trainer: BaseTrainer) -> None:
        """Puts it in the place of transformers' own bar and print-outs."""
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
        if state.global_step < state.max_steps:
            self._show(state, self.progress)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.evaluated |= {name: value for name, value in (metrics or {}).items() if name in EVALUATED}
        self._since = time.monotonic()  # an evaluation is no part of a step
        if state.global_step < state.max_steps:
            self._show(state, self.progress)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state, self.progress.finish)

    def _show(self, state: Any, how: Callable[[str, float], None]) -> None:
        if state.is_world_process_zero and state.max_steps:
            evaluated = [
                words.format(self.evaluated[key]) for key, words in EVALUATED.items() if key in self.evaluated
            ]
            figures = ", ".join([*self._of_steps(), *evaluated])
            how(f"step {state.global_step}{figures and ': '}{figures}", state.global_step / state.max_steps)

    def _of_steps(self) -> list[str]:
        """The last step's loss, and how fast the last steps were."""
        if not self.past:
            return []
        seconds, tokens = (sum(values) for values in zip(*self.past, strict=True))
        each = seconds / len(self.past)
        return [
            f"loss {self.trainer.steps.loss:.3f}",
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s",
            f"{each:.2f} s a step" if each < 100 else f"{each:.0f} s a step",
            *_memory(self.trainer.args.device),
        ]


def _memory(device: torch.device) -> list[str]:
    """The most that was allocated on the GPU so far, or what the process holds now; empty where it cannot be asked."""
    if device.type == "cuda":
        return [f"{size_text(torch.cuda.max_memory_allocated(device))} on the GPU"]
    if not PROCESS.is_file():
        return []
    held = next(line for line in PROCESS.read_text(encoding="ascii").splitlines() if line.startswith("VmRSS"))
    return [f"{size_text(1024 * int(held.split()[1]))} of memory"]
