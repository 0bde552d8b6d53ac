"""One moving line while a drafter is trained: step, loss, expected acceptance, block efficiency, time left."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from csdraft.progress import Progress

__all__ = ["Line"]

SHOWN = {
    "loss": "loss {:.3f}",
    "eval_acceptance": "expected acceptance {:.2f}",
    "eval_block_efficiency": "block efficiency {:.2f}",
    "eval_block_efficiency_sampled": "sampled {:.2f}",
}


class Line(TrainerCallback):
    """Shows what was last logged; the figures of an evaluation stay until the next."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.seen: dict[str, float] = {}

    @classmethod
    def instead_of_others(cls, trainer: Trainer) -> None:
        """Puts it in the place of transformers' own bar and print-outs."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.restart()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen |= {name: value for name, value in (logs or {}).items() if name in SHOWN}
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def _show(self, state: Any) -> None:
        if state.is_world_process_zero and state.max_steps:
            figures = ", ".join(SHOWN[name].format(float(self.seen[name])) for name in SHOWN if name in self.seen)
            self.progress(f"step {state.global_step}{figures and ': '}{figures}", state.global_step / state.max_steps)
