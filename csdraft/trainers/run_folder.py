"""A run is one training in its folder. The same command, given again, resumes it, or finds that it is finished.

Only one run writes to a folder: the first process of a run holds a file lock on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerState, TrainingArguments

from csdraft.data.shards import Part, check_unchanged, write_whole
from csdraft.trainers.base import BaseTrainer
from csdraft.trainers.checkpoints import (
    UNREADABLE,
    check_options,
    chosen_checkpoint,
    last_checkpoint,
    options_of,
    passed_over,
    read_mark,
)

__all__ = ["FINISHED", "RunFolder", "only_run", "say"]

LOCK = "_lock"
"""The lock's file in the run's folder. transformers does not upload files whose names begin with _."""


@contextmanager
def only_run(folder: str | None) -> Iterator[None]:
    """Keeps other runs out of a folder while this block runs. The system frees the lock of a killed process.

    Does nothing on other processes than the first of a run, and in folders that cannot be written or locked. A block
    inside such a block may write to the folder too.

    Raises:
        ValueError: another run is writing to the folder.
    """
    file = Path(folder or "").resolve() / LOCK
    with ExitStack() as stack:
        try:
            if Part.of_environment().rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(FileLock(file, blocking=False, is_singleton=True))
                if lock.lock_counter == 1:
                    stack.callback(file.unlink, missing_ok=True)  # before it is unlocked
                    file.write_text(str(os.getpid()), encoding="utf-8")
        except Timeout:
            process = file.read_text(encoding="utf-8").strip()
            raise ValueError(
                f"another run{f' (process {process})' if process else ''} is writing to {file.parent}: wait for it, "
                "end it, or give another output_dir"
            ) from None
        except (OSError, NotImplementedError):
            pass  # no lock here; `check_writable` says why
        yield


FINISHED = "finished.json"
STATE = ("global_step", "max_steps", "epoch", "log_history", "best_metric", "best_global_step")
"""What FINISHED keeps of the trainer's state."""


def say(text: str) -> None:
    """Prints on the first process."""
    if Part.of_environment().rank == 0:
        print(text, flush=True)


class RunFolder:
    """What the folder of a training holds.

    Attributes:
        finished: whether it holds the result of all steps in `args`.
        checkpoint: where the run continues from; None is its beginning.

    Raises:
        ValueError: it holds a run with other options, or broken checkpoints only.
    """

    def __init__(self, args: TrainingArguments):
        self.args, self.folder = args, Path(args.output_dir or "")
        begins_again = args.resume_from_checkpoint is False
        self._done = None if begins_again else _read(self.folder / FINISHED)
        self.finished = self._done is not None and self._is_all(self._done)
        self.checkpoint = None if self.finished else chosen_checkpoint(args)
        self._before = self._done if self.checkpoint is None else read_mark(self.checkpoint)
        if self._before is not None:
            check_options(self.checkpoint or str(self.folder), self._before["options"], options_of(args))

    def _is_all(self, done: dict[str, Any]) -> bool:
        """Whether a finished run has as many steps as `args` say; false if its last checkpoint is to be trained on."""
        args, named = self.args, self.args.resume_from_checkpoint
        if isinstance(named, str) and Path(named).resolve().parent == self.folder.resolve():
            return False
        # Its last checkpoints were removed, and earlier ones left: the run continues from those.
        left = any(self.folder.glob("checkpoint-*/run.json"))
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
            say(self._end())
            return
        if self.args.resume_from_checkpoint in (None, True):
            for name, reason in passed_over(str(self.folder)).items():
                say(f"skipped {self.folder / name}, which is not whole: {reason}")
        if self.checkpoint is not None:
            say(f"resumed from {self.checkpoint}")

    def _end(self) -> str:
        """What to print about a finished run, and what can be done now."""
        assert self._done is not None
        steps = self._done["state"]["global_step"]
        further = "To train further raise max_steps or num_train_epochs"
        if last_checkpoint(str(self.folder)) is None:
            further += " (from the first step: no checkpoint is left)"
            if any(self.folder.glob("checkpoint-*")):
                further = (
                    "It has no checkpoint to train further from (save_only_model=true): start from its weights with "
                    "student=FOLDER (model=FOLDER of pretrain.py) and another output_dir"
                )
        return (
            f"finished: {self.folder} holds the result of all {steps} steps; nothing to do. {further}; "
            "to begin again give another output_dir, or resume_from_checkpoint=false"
        )

    def train(self, trainer: BaseTrainer) -> bool:
        """Trains to the end; False if a signal stopped it before, with a checkpoint to resume from."""
        if trainer.args.should_save:
            (self.folder / FINISHED).unlink(missing_ok=True)
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            trainer.interrupt.restore()
        trainer.accelerator.wait_for_everyone()  # if one process exited early, the launcher would kill the others
        state = trainer.state
        if trainer.status:
            say(
                f"stopped at step {state.global_step} of {state.max_steps}; the same command continues from "
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
        """Writes the result with `save`, then the note that the run is finished."""
        trainer.together(self.folder, save)
        checkpoints = sorted(self.folder.glob("checkpoint-*/run.json"), key=lambda path: path.stat().st_mtime)
        note = {
            **trainer.noted,
            "checkpoint": checkpoints[-1].parent.name if checkpoints else None,
            "state": {key: getattr(trainer.state, key) for key in STATE},
        }

        def mark() -> None:
            if trainer.args.should_save:
                with write_whole(self.folder / FINISHED) as file:
                    file.write(json.dumps(note, indent=1).encode())

        trainer.together(self.folder, mark)
        say(f"the result is in {self.folder}")


def _read(path: Path) -> dict[str, Any] | None:
    """The note of a finished run; None if there is none that can be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return note if {"options", "checkpoint"} <= note.keys() and set(note["state"]) == set(STATE) else None
    except UNREADABLE:
        return None
