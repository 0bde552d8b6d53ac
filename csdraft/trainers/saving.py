"""A trainer whose checkpoints are written whole or not at all, without nan, and with one error if the disk is full."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from csdraft.trainers.checkpoints import last_checkpoint, mark_whole
from csdraft.trainers.options import options_of
from csdraft.trainers.stops import NonFinite, Stopped, Unwritable, first_non_finite, writing

__all__ = ["SavingTrainer"]


class SavingTrainer(Trainer):
    """`transformers.Trainer` with safe writing.

    Attributes:
        noted: what every checkpoint's `run.json` says about the run; see `csdraft.trainers.run_folder`.
    """

    def __init__(self, model: nn.Module, args: Any, **options: Any):
        super().__init__(model, args, **options)
        self.noted: dict[str, Any] = {"options": options_of(args)}

    def note(self) -> dict[str, Any]:
        """What the `run.json` of a checkpoint written now says."""
        return {**self.noted, "weights_only": self.args.save_only_model}

    def trained(self) -> nn.Module:
        """The model that is saved."""
        return self.model  # type: ignore[return-value]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        def write() -> None:
            self.check_weights()
            super(SavingTrainer, self).save_model(output_dir, _internal_call)

        self.together(output_dir or self.args.output_dir or "", write)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Older checkpoints are removed only when the new one is marked as whole."""
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed or begun again
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self.together(folder, lambda: super(SavingTrainer, self)._save_checkpoint(model, trial))
        except Unwritable:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if not self.args.push_to_hub:
            self._complete(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._complete(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _complete(self, folder: Path) -> None:
        """Marks a checkpoint as whole once every process has written its part."""

        def mark() -> None:
            if self.args.should_save:
                mark_whole(folder, self.note())
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(folder.parent), self.args.save_total_limit, best, use_mtime=True)

        self.accelerator.wait_for_everyone()
        self.together(folder, mark)

    def check_weights(self) -> None:
        """Raises NonFinite if the weights of the model to save are not finite."""
        if name := first_non_finite(self.trained().named_parameters()):
            raise NonFinite(
                f"step {self.state.global_step}: weights are not finite ({name}), and nothing was saved. "
                f"{self.last_whole()}. Try a smaller learning_rate or more warmup_steps, in another output_dir"
            )

    def last_whole(self) -> str:
        """Words for messages about the last whole checkpoint."""
        last = last_checkpoint(self.args.output_dir or "")
        return f"The last whole checkpoint is {last}" if last else "There is no checkpoint yet"

    def together(self, folder: str | Path, write: Callable[[], None]) -> None:
        """Calls `write` on every process. If one of them cannot write, all raise its error, so that none waits.

        Under DeepSpeed and FSDP the processes talk while they write: there, the failing process raises at once.
        """
        stopped: Stopped | None = None
        try:
            with writing(folder):
                write()
        except Stopped as error:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise
            stopped = error
        others = gather_object([stopped and (type(stopped), str(stopped))])
        if stopped is not None:
            raise stopped
        for kind, message in filter(None, others):
            raise kind(message)
