"""A run is one training in its folder: begun, resumed, or finished. A command that is given again finds out which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from csdraft.data.changes import check_unchanged
from csdraft.data.shards import Part, write_whole
from csdraft.trainers.base import BaseTrainer
from csdraft.trainers.checkpoints import chosen_checkpoint, passed_over, read_mark
from csdraft.trainers.options import check_options, options_of

__all__ = ["RunFolder", "forget", "is_finished", "say"]

FINISHED = "finished.json"
STATE = ("global_step", "max_steps", "epoch", "log_history", "best_metric", "best_global_step")
"""What is kept of the trainer's state."""


def say(text: str) -> None:
    """Prints on the first process."""
    if Part.of_environment().rank == 0:
        print(text, flush=True)


def forget(folder: Path) -> None:
    """Removes what a run in a folder would be resumed from: its checkpoints, and the note that it is finished."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / FINISHED).unlink(missing_ok=True)


def is_finished(args: TrainingArguments) -> bool:
    """Whether there is nothing to do, which is then said; asked before any data or model is read."""
    run = RunFolder(args)
    if run.finished:
        run.say_where()
    return run.finished


class RunFolder:
    """What the folder of a training holds.

    Args:
        args: of the training.

    Attributes:
        finished: whether it holds the result of all steps that `args` ask for.
        checkpoint: where the run goes on from; None is its beginning.

    Raises:
        ValueError: it holds a run with other options, or only checkpoints that are cut short.
    """

    def __init__(self, args: TrainingArguments):
        self.args, self.folder, self.options = args, Path(args.output_dir or ""), options_of(args)
        begins_again = args.resume_from_checkpoint is False
        self._done = None if begins_again else _read(self.folder / FINISHED)
        self.finished = self._done is not None and self._is_all(self._done)
        self.checkpoint = None if self.finished else chosen_checkpoint(args)
        self._before: dict[str, Any] | None = None if begins_again else self._done
        if self.checkpoint is not None:
            self._before = read_mark(self.checkpoint)
        if self._before is not None:
            check_options(self.checkpoint or str(self.folder), self._before["options"], self.options)

    def _is_all(self, done: dict[str, Any]) -> bool:
        """Whether a finished run has the length that is asked for; not if its last checkpoints were removed."""
        args, left = self.args, list(self.folder.glob("checkpoint-*/run.json"))
        named = args.resume_from_checkpoint
        if isinstance(named, str) and Path(named).resolve().parent == self.folder.resolve():
            return False  # a checkpoint of this very run is to be trained on
        if left and done["checkpoint"] is not None and not (self.folder / done["checkpoint"]).is_dir():
            return False
        if args.max_steps > 0:
            return done["state"]["global_step"] >= args.max_steps
        return (done["state"]["epoch"] or 0) >= args.num_train_epochs

    def check_data(self, data: dict[str, Any]) -> None:
        """Raises ValueError if the run was begun with other rows; see `csdraft.trainers.publish.identity`."""
        if self._before is not None and "data" in self._before:
            check_unchanged(
                f"{self.checkpoint or self.folder} holds a run on data with",
                self._before["data"],
                data,
                "The data set, or how it is read, has changed: give another output_dir, or begin again with "
                "resume_from_checkpoint=false",
            )

    def say_where(self) -> None:
        """Prints what the folder holds and what happens now."""
        if self.finished:
            assert self._done is not None
            steps = self._done["state"]["global_step"]
            say(
                f"finished: {self.folder} holds the result of all {steps} steps; nothing is done. To train further "
                "raise max_steps or num_train_epochs; to begin again give another output_dir, or "
                "resume_from_checkpoint=false"
            )
            return
        if self.args.resume_from_checkpoint in (None, True):
            for name, reason in passed_over(str(self.folder)).items():
                say(f"passed over {self.folder / name}, which is not whole: {reason}")
        if self.checkpoint is not None:
            say(f"resumed from {self.checkpoint}")

    def train(self, trainer: BaseTrainer) -> bool:
        """Trains to the end; False if a signal came before it, when there is a checkpoint to resume from."""
        if trainer.args.should_save:
            (self.folder / FINISHED).unlink(missing_ok=True)
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            trainer.interrupt.restore()
        trainer.accelerator.wait_for_everyone()  # a process that exits early would have the others killed as they save
        state = trainer.state
        if trainer.status:
            say(
                f"stopped at step {state.global_step} of {state.max_steps}; the same command goes on from "
                f"{self.folder}/checkpoint-{state.global_step}"
            )
            return False
        if state.best_global_step == 0:
            say(
                f"no evaluation was better than the one at the start ({trainer.args.metric_for_best_model} "
                f"{state.best_metric:.4g}): the weights of the start are kept"
            )
        return True

    def restore(self, trainer: BaseTrainer, load: Callable[[Any, str], None]) -> None:
        """Gives a trainer the weights and the log of a finished run."""
        assert self._done is not None
        load(trainer.trained(), str(self.folder))
        trainer.state = TrainerState(**self._done["state"])

    def finish(self, trainer: BaseTrainer, save: Callable[[], None]) -> None:
        """Writes the result with `save`, and then that the run is finished."""
        trainer.together(self.folder, save)
        checkpoints = sorted(self.folder.glob("checkpoint-*/run.json"), key=lambda path: path.stat().st_mtime)
        state = trainer.state
        document = {
            **trainer.noted,
            "checkpoint": checkpoints[-1].parent.name if checkpoints else None,
            "state": {key: getattr(state, key) for key in STATE},
        }

        def mark() -> None:
            if trainer.args.should_save:
                with write_whole(self.folder / FINISHED) as file:
                    file.write(json.dumps(document, indent=1).encode())

        trainer.together(self.folder, mark)


def _read(path: Path) -> dict[str, Any] | None:
    """A document of JSON; None if there is none, or it is cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
