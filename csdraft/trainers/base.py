"""The base of all trainers here: exact resumes, a stop at the first nan, and checkpoints that are whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from csdraft.data.packing import Filled, Shuffled
from csdraft.trainers.checkpoints import EVALUATION, last_checkpoint, mark_whole, options_of, read_mark
from csdraft.trainers.muon import MuonAdamW
from csdraft.trainers.stops import Interrupt, NonFinite, Stopped, Unwritable, first_non_finite, shown, writing

__all__ = ["BaseTrainer"]

MOST_SKIPPED = 100
"""Steps in a row that fp16's loss scaling may skip while it searches for a scale."""
MOST_QUOTED = 3
"""Rows whose first words a message quotes."""


class Steps:
    """Collects the losses of a step's micro-batches, and keeps the mean since the last log.

    The trainer of transformers keeps a sum on each process. It hides nan in it (`logging_nan_inf_filter`), and a
    resumed run starts it at zero, so that its first logged loss differs from that of an uninterrupted run.

    Attributes:
        loss: of the last step, over all processes; nan before the first.
        tokens: that this process read in the current step, padding included.
        table: (processes, micro-batches) losses of the last step.
        unlogged: sum and number of the losses since the last log; checkpoints keep it.
    """

    def __init__(self) -> None:
        self.loss, self.tokens = math.nan, 0
        self.table: list[list[float]] = []
        self.unlogged = [0.0, 0]
        self._parts: list[Tensor] = []

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """Begins a step of these micro-batches."""
        self._parts.clear()
        self.tokens = sum(
            batch[name].numel() for batch in batches for name in ("input_ids", "decoder_input_ids") if name in batch
        )

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, scaled so that those of a step add up."""
        self._parts.append(loss.detach().float())

    def close(self, accelerator: Any) -> None:
        """Ends the step: every process gets all losses. All processes must call it."""
        own = torch.stack(self._parts)  # (micro-batches,)
        self.table = accelerator.gather(own).view(-1, len(own)).tolist()
        self.loss = sum(map(sum, self.table)) / len(self.table)
        total, count = self.unlogged
        self.unlogged = [total + self.loss, count + 1]

    def mean(self) -> float:
        """The mean loss of the steps since the last call."""
        total, count = self.unlogged
        self.unlogged = [0.0, 0]
        return total / count if count else math.nan


class BaseTrainer(Trainer):
    """`transformers.Trainer` that resumes bit for bit, and stops at a loss or gradient that is not finite.

    Attributes:
        noted: what every checkpoint's `run.json` says about the run; see `csdraft.trainers.run_folder`.
        interrupt: knows whether a signal has stopped the run.
        steps: losses of the last step.
        resumed_from: the checkpoint that the run continues from; None if it begins at the start.
    """

    def __init__(self, model: nn.Module, args: Any, **options: Any):
        super().__init__(model, args, **options)
        if self.train_dataset is not None:
            self.train_dataset = Filled(self.train_dataset)
        self.noted: dict[str, Any] = {"options": options_of(args)}
        self.steps, self.interrupt = Steps(), Interrupt()
        self.resumed_from: str | None = None
        self._order, self._first_step, self._skipped = Shuffled(0, 0), 0, 0
        self.add_callback(self.interrupt)

    @property
    def status(self) -> int:
        """The program's exit status after the run: 0 if all steps are done, else that of the signal."""
        return self.interrupt.status if self.state.global_step < self.state.max_steps else 0

    def create_optimizer(self, model: Any = None) -> Any:
        args: Any = self.args
        if args.muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("muon=true needs whole matrices, which the engine splits; leave muon out, or use DDP")
        if args.muon and self.optimizer is None:
            betas = args.adam_beta1, args.adam_beta2
            self.optimizer = MuonAdamW(self.trained(), args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
        return super().create_optimizer(model)

    # The order of the data.

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self._train_batch_size * self.args.world_size
        self._order = Shuffled(len(self.train_dataset), seed, together)  # type: ignore[arg-type]
        return self._order

    def _run_epoch(self, *, epoch: int, num_update_steps_per_epoch: int, **options: Any) -> None:
        """One epoch in its own order. Does nothing if all steps are done; transformers would do one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._order.set_epoch(epoch)
        self._first_step = epoch * num_update_steps_per_epoch
        super()._run_epoch(epoch=epoch, num_update_steps_per_epoch=num_update_steps_per_epoch, **options)

    # Start and resume.

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir or "")
        self.resumed_from = resume_from_checkpoint or None
        return super().train(self.resumed_from, *args, **options)

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        """Also restores what transformers does not, and takes logging_steps and the like from the new arguments."""
        trained = super()._init_training_state(*args, **options)
        state = self.state
        state.compute_steps(self.args, state.max_steps)
        if self.resumed_from is not None:
            mark = read_mark(self.resumed_from)
            self.steps.unlogged = mark["unlogged"]
            if mark["evaluation"] != self._evaluation():  # its figures cannot be compared with new ones
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            elif state.best_global_step is not None and (best := self._checkpoint(state.best_global_step)).is_dir():
                state.best_model_checkpoint = str(best)  # the run's folder may have been moved
        return trained

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir or "", f"checkpoint-{step}")

    def note(self) -> dict[str, Any]:
        """What the `run.json` of a checkpoint written now says."""
        own = {"weights_only": self.args.save_only_model, "unlogged": self.steps.unlogged}
        return {**self.noted, **own, "evaluation": self._evaluation()}

    def _evaluation(self) -> dict[str, Any]:
        return {key: getattr(self.args, key) for key in EVALUATION if key in vars(self.args)}

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Also saves a checkpoint at the start of a run (`skip_scheduler`), which may turn out to be the best."""
        if skip_scheduler and self.state.global_step:
            return {}  # the log of a resumed run has the figures of the start
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler and self.args.load_best_model_at_end:
            self._determine_best_metric(metrics, trial)
            self._save_checkpoint(self.model_wrapped, trial)
            self.state.best_model_checkpoint = str(self._checkpoint(0))
        return metrics

    # A step: its losses, and whether they are finite.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.steps.begin(batches)
        return batches, count

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.steps.add(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called just before the optimiser changes weights: the last moment to stop."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.steps.close(self.accelerator)
        self._check_step(float(norm) if norm is not None else 0.0)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            logs = logs | {"loss": self.steps.mean()}
        super().log(logs, *args, **options)

    def _check_step(self, norm: float) -> None:
        """Raises NonFinite, on all processes alike, if the loss or the gradient of the step is not finite."""
        for process, losses in enumerate(self.steps.table):
            for part, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise NonFinite(self._message(f"the loss is {loss}", self._rows(part, process)))
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (MOST_SKIPPED if self.args.fp16 else 0):
            processes, parts = range(len(self.steps.table)), range(len(self.steps.table[0]))
            rows = [row for part in parts for process in processes for row in self._rows(part, process)]
            raise NonFinite(self._message(f"the gradient's norm is {norm}, the loss {self.steps.loss:.4g}", rows))

    def _rows(self, part: int, process: int) -> list[int]:
        """Rows of the data set in one process's micro-batch of the current step."""
        step = self.state.global_step - self._first_step
        number = (step * self.args.gradient_accumulation_steps + part) * self.args.world_size + process
        return [row for item in self._order.batch(number, self._train_batch_size) for row in self.rows_of(item)]

    def rows_of(self, item: int) -> list[int]:
        """Rows of the data set in one item of `train_dataset`."""
        return [item]

    def begin_of(self, row: int) -> str:
        """The first words of a row of the data set; empty if not known."""
        return ""

    def _message(self, what: str, rows: list[int]) -> str:
        begin = "; ".join(f"row {row} begins {text!r}" for row in rows[:MOST_QUOTED] if (text := self.begin_of(row)))
        return (
            f"step {self.state.global_step + 1}: {what} with rows {shown(rows)} of the data set"
            f"{f' ({begin})' if begin else ''}. Nothing of this step was saved. {self.last_whole()}. {self._way_out()}"
        )

    def _way_out(self) -> str:
        """What the user can do: load another model if its weights are not finite, else change training options."""
        for what, model in self.models():
            if name := first_non_finite(model.named_parameters()):
                return f"{what} has weights that are not finite ({name}): load another one"
        return (
            f"Try a learning_rate below {self.args.learning_rate:g}, more warmup_steps, a smaller max_grad_norm, "
            "bfloat16 or float32 in place of float16, and look at those rows; changed options need another output_dir"
        )

    def models(self) -> list[tuple[str, nn.Module]]:
        """All models in use, each with its name in messages."""
        return [("The model", self.model)]  # type: ignore[list-item]

    # Writing: whole or not at all.

    def trained(self) -> nn.Module:
        """The model that is saved."""
        return self.model  # type: ignore[return-value]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        def write() -> None:
            self.check_weights()
            super(BaseTrainer, self).save_model(output_dir, _internal_call)

        self.together(output_dir or self.args.output_dir or "", write)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Older checkpoints are removed only when the new one is marked as whole."""
        folder = self._checkpoint(self.state.global_step)
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed or begun again
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self.together(folder, lambda: super(BaseTrainer, self)._save_checkpoint(model, trial))
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
        """A sentence for messages about the last whole checkpoint."""
        last = last_checkpoint(self.args.output_dir or "")
        return f"The last whole checkpoint is {last}" if last else "There is no checkpoint yet"

    def together(self, folder: str | Path, write: Callable[[], None]) -> None:
        """Calls `write` on every process. If one of them cannot write, all raise its error, so that none waits.

        Under DeepSpeed and FSDP the processes communicate while they write: there, the failing process raises at once.
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
