"""The progress bar of a training, with the loss of each step, the speed, the memory and the last evaluation."""

from __future__ import annotations

from math import isnan
from typing import Any

import psutil
import torch
from transformers import PrinterCallback, ProgressCallback

from csdraft.amounts import size_text
from csdraft.progress import PAUSE
from csdraft.trainers.base import BaseTrainer

__all__ = ["Line"]

EVALUATED = {
    "eval_acceptance": "expected acceptance {:.2f}",
    "eval_block_efficiency": "block efficiency {:.2f}",
    "eval_block_efficiency_sampled": "sampled {:.2f}",
}


class Line(ProgressCallback):
    """Shows every step with its own loss; the figures of an evaluation stay until the next one."""

    def __init__(self, trainer: BaseTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.evaluated: dict[str, str] = {}

    @classmethod
    def instead_of_others(cls, trainer: BaseTrainer) -> None:
        """Replaces the progress bar and printed logs of transformers."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(trainer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In a resumed run, the earlier steps do not count for the speed."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step
            if not self.training_bar.fp.isatty():
                self.training_bar.mininterval = PAUSE

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note()
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Shows no second bar."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.evaluated |= {name: text.format(metrics[name]) for name, text in EVALUATED.items() if name in metrics}
        self._note()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the bar has the figures."""

    def _note(self) -> None:
        """Notes the figures that the bar shows when it is next drawn."""
        if self.training_bar is None:
            return
        device, steps = self.trainer.args.device, self.trainer.steps
        figures = [] if isnan(steps.loss) else [f"loss {steps.loss:.3f}"]  # evaluations may come before the first step
        if rate := self.training_bar.format_dict["rate"]:
            figures.append(f"{rate * steps.tokens * self.trainer.args.world_size:,.0f} tokens/s")
        if device.type == "cuda":
            figures.append(f"{size_text(torch.cuda.max_memory_allocated(device))} on the GPU")
        else:
            figures.append(f"{size_text(psutil.Process().memory_info().rss)} of memory")
        self.training_bar.set_postfix_str(", ".join([*figures, *self.evaluated.values()]), refresh=False)
