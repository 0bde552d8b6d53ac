"""Distils a drafter: a student learns to choose as its target does, and is measured by what it saves the target.

One run: check what can be checked cheaply, load the frozen target, make the student, read the texts, train, save a
folder that `ModelDrafter` loads. DistillSpec (arXiv 2310.08461) is on-policy data with total variation or KL;
sequence-level distillation (arXiv 1606.07947) is cross-entropy on the target's own text.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from csdraft.data.chat import chat_of
from csdraft.data.packing import IGNORED
from csdraft.drafters.model import base_model
from csdraft.trainers.checkpoints import note_student
from csdraft.trainers.distillation import Distillation
from csdraft.trainers.engines import copy_whole, is_sharded, keeps_parts, placed_here, uses
from csdraft.trainers.exam import Exam
from csdraft.trainers.interrupt import Interrupt
from csdraft.trainers.objective import Objective
from csdraft.trainers.on_policy import rewritten
from csdraft.trainers.publish import describe
from csdraft.trainers.students import load_student_weights, save_student

__all__ = ["DistillArguments", "DrafterTrainer"]


@dataclass
class DistillArguments(TrainingArguments):
    """`transformers.TrainingArguments`, unchanged, and what distilling a drafter needs besides."""

    target: str = field(default="models/smol-target", metadata={"help": "Folder or Hub id of the model to draft for."})
    target_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the target."})
    target_dtype: str = field(default="auto", metadata={"help": "dtype of the frozen target's weights."})
    target_device_map: str | None = field(
        default=None, metadata={"help": "Where the target lives, such as 'auto'; None is the student's device."}
    )
    target_quantization: dict | None = field(
        default=None, metadata={"help": "{quant_method: bitsandbytes, load_in_8bit: true}, for example."}
    )
    target_sharded: bool = field(
        default=False, metadata={"help": "Its weights spread over the processes by ZeRO-3; the student as it is."}
    )

    student: str | None = field(default=None, metadata={"help": "Folder or Hub id of the drafter to start from."})
    init: dict | None = field(
        default=None, metadata={"help": "Or a new one: {from_target: {layers: [0, 15]}} or {config: {...}}."}
    )
    peft: dict | None = field(
        default=None, metadata={"help": "LoRA options; with `layers`, on the target's own layers and shared weights."}
    )

    dataset: str = field(default="stdlib", metadata={"help": "Texts: a Hub id, file, folder, or 'stdlib'."})
    split: str = field(default="train", metadata={"help": "Of the data set."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Texts used at most."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File, text or name of a chat template; None is the tokenizer's."}
    )
    chat_template_options: dict | None = field(
        default=None, metadata={"help": "What it reads besides messages: {enable_thinking: false}, tools, ..."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a packed block, and of a text at most."})
    target_cache: str | None = field(
        default=None, metadata={"help": "The target's top-k logits for these texts (scripts/cache_logits.py)."}
    )
    packing: bool = field(default=True, metadata={"help": "Several texts in a block, kept apart by their positions."})

    losses: dict = field(
        default_factory=lambda: {"forward_kl": 1.0}, metadata={"help": "Weights by name, of csdraft/losses."}
    )
    student_temperature: float = field(default=1.0, metadata={"help": "Divides the student's logits in the loss."})
    target_temperature: float = field(default=1.0, metadata={"help": "Divides the target's logits in the loss."})
    chunk: int = field(default=256, metadata={"help": "Positions whose logits are held in memory at once."})
    on_policy: float = field(default=0.0, metadata={"help": "Share of the texts that the student writes anew."})
    on_policy_prompt: int = field(default=64, metadata={"help": "Tokens of a text that stay, at least."})

    temperature: float = field(default=1.0, metadata={"help": "At which drafts will be used; for sampling here."})
    eval_prompts: str | None = field(default=None, metadata={"help": "Held-out prompts; None is no evaluation."})
    eval_split: str = field(default="test", metadata={"help": "Of the held-out prompts' data set."})
    eval_limit: int = field(default=24, metadata={"help": "Held-out prompts used at most."})
    eval_depth: int = field(default=5, metadata={"help": "Drafted tokens a round when evaluating."})
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens of each text when evaluating."})

    muon: bool = field(default=False, metadata={"help": "Muon for the weight matrices instead of `optim`."})
    threads: int | None = field(default=None, metadata={"help": "torch CPU threads; None leaves torch's default."})
    use_cache: bool = field(default=True, metadata={"help": "The student decodes while it is trained."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches are made for the trainer."})

    def __post_init__(self) -> None:
        if (self.deepspeed or uses("DeepSpeed")) and importlib.util.find_spec("deepspeed") is None:
            raise ValueError("deepspeed is needed and not installed: pip install csdraft[deepspeed]")
        super().__post_init__()
        self._check_numbers()
        _ = chat_of(self)
        if self.target_cache and self.on_policy:
            raise ValueError(f"target_cache with on_policy={self.on_policy}: new texts are in no cache; leave one out")
        if self.target_sharded and (self.target_device_map is not None or self.target_quantization is not None):
            raise ValueError(
                "target_sharded=true spreads the target's own weights over the processes: leave out target_device_map "
                "and target_quantization, or target_sharded"
            )
        if self.student is not None and self.init is not None:
            raise ValueError("student and init are both given; start from the one or make the other")

    def _check_numbers(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy={self.on_policy} is a share of the texts: give a number from 0 to 1")
        if self.on_policy and self.on_policy_prompt >= self.max_length:
            raise ValueError(
                f"on_policy_prompt={self.on_policy_prompt} leaves nothing to write in texts of max_length="
                f"{self.max_length} tokens; keep fewer"
            )
        for name in ("max_length", "eval_depth", "eval_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dataset_limit is not None and self.dataset_limit < 1:
            raise ValueError(f"dataset_limit={self.dataset_limit} leaves no text; give at least 1, or leave it out")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; greedy drafting is measured anyway")

    @property
    def objective(self) -> Objective:
        return Objective(self.losses, self.student_temperature, self.target_temperature, self.chunk)


class DrafterTrainer(Trainer):
    """Trains a student on a frozen target's distributions; evaluates by decoding; saves drafters.

    Args:
        student: trained; anything `csdraft.trainers.students.make_student` makes.
        target: frozen; left as it is.
        args: see `DistillArguments`.
        exam: what `evaluate` runs; None makes `evaluate` an error.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self,
        student: nn.Module,
        target: nn.Module,
        args: DistillArguments,
        exam: Exam | None = None,
        **options: Any,
    ):
        args._setup_devices  # noqa: B018 - counts the GPUs
        args._n_gpu = min(args._n_gpu, 1)  # one process trains on one: replicas would meet a target elsewhere
        super().__init__(Distillation(student, target, args.objective), args, **options)
        self.exam = exam
        if not vars(base_model(student)).get("peft_config"):  # it will be another model than the one it is called
            student.config.name_or_path, student.config._commit_hash = args.output_dir, None  # type: ignore[union-attr]
        self._copy = copy.deepcopy(student).to(args.device) if keeps_parts(self) else None
        self.loss_is_scaled_for_ga = True  # by the number of target tokens of the whole step
        self.interrupt = Interrupt()
        self.add_callback(self.interrupt)
        if placed_here(target):
            target.to(args.device)

    @property
    def student(self) -> nn.Module:
        return self.model.student  # type: ignore[union-attr]

    @property
    def target(self) -> nn.Module:
        return self.model.target  # type: ignore[union-attr]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        """An order that depends on seed and epoch only, however many processes share it."""
        data = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Shuffled(len(data), seed)  # type: ignore[arg-type]

    # A step: batches, the number of their target tokens, the loss.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if self.args.on_policy > 0:  # type: ignore[union-attr]
            with self.decoding() as student:
                batches = [self._rewritten(batch, student) for batch in batches]
        count = sum((scored(batch).sum() for batch in batches), torch.zeros((), dtype=torch.long, device=device))
        return batches, self.accelerator.gather(count.reshape(1)).sum().clamp(min=1)  # type: ignore[union-attr]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total = scored(inputs).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = model(**inputs, total=total)
        if num_items_in_batch is not None:  # processes' gradients are averaged, their sum is wanted
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _rewritten(self, batch: dict[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
        args, tokenizer = self.args, self.processing_class
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id  # type: ignore[union-attr]
        keys = (args.seed, self.state.global_step)
        return rewritten(
            batch,
            student,
            args.on_policy,  # type: ignore[union-attr]
            keys,
            args.on_policy_prompt,  # type: ignore[union-attr]
            args.temperature,  # type: ignore[union-attr]
            end if pad is None else pad,
        )

    @contextmanager
    def decoding(self) -> Iterator[nn.Module]:
        """The student, whole and in eval mode, to decode with; global random numbers are left alone.

        Where an engine keeps parts of it on other processes, it is a copy: every process must enter.
        """
        student = self._whole_student()
        training = student.training
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            student.eval()
            try:
                yield student
            finally:
                student.train(training)

    def _whole_student(self) -> nn.Module:
        if self._copy is None:
            return self.student
        copy_whole(self.student, self._copy)
        return self._copy

    # Evaluation.

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Acceptance and block efficiency on the held-out prompts; see `Exam.grade`."""
        if self.exam is None:
            raise ValueError("there are no prompts to evaluate on: give eval_prompts=FILE (or exam=)")
        # A target in parts is run by all processes together, so they sit the same exam: quotients stay what they are.
        part = slice(None) if is_sharded(self.target) else slice(self.args.process_index, None, self.args.world_size)
        with self.decoding() as student:
            sums = self.exam.sit(self.target, student, part)
        figures = self.exam.grade(self._summed(sums))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _summed(self, sums: dict[str, float]) -> dict[str, float]:
        """Over the processes; one without prompts has none of the names."""
        if self.args.world_size == 1:
            return sums
        from accelerate.utils import gather_object

        total: dict[str, float] = {}
        for part in gather_object([sums]):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    # Checkpoints hold the student alone, as a folder that loads without this class.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {name.removeprefix("student."): value for name, value in state_dict.items()}
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_student(self.student, folder, self.processing_class, state_dict)
            if folder != self.args.output_dir:
                note_student(self.args, folder)  # type: ignore[arg-type]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """README.md with the measured acceptance, and provenance.json, in `output_dir`."""
        if self.is_world_process_zero():
            describe(self, Path(self.args.output_dir))  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_student_weights(self.student, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        load_student_weights(self.student, self.state.best_model_checkpoint)


class Shuffled(Sampler):
    """All of a data set's indices in an order of their own for every epoch."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(f"{self.seed} {self.epoch}").sample(range(self.size), self.size))


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Where a batch's labels count: the first token of a decoder-only row is predicted by nobody."""
    labels = batch["labels"]
    return (labels if "decoder_input_ids" in batch else labels[:, 1:]) != IGNORED
