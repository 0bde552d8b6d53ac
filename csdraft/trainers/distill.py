"""Distils a drafter: a student learns to predict what its target would choose, and is evaluated by drafting for it.

DistillSpec (arXiv 2310.08461) is on-policy data with total variation or KL;
sequence-level distillation (arXiv 1606.07947) is cross-entropy on the target's own text.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from csdraft.data.packing import IGNORED, Texts, check_packing, pad_of
from csdraft.data.row_arrays import largest_of
from csdraft.data.target_cache import FeatureCache
from csdraft.decoding.feature_session import FeatureModel
from csdraft.models import base_model
from csdraft.trainers.base import BaseTrainer
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.engines import copy_whole, is_sharded, keeps_parts, placed_here
from csdraft.trainers.evaluation import Evaluation
from csdraft.trainers.objective import Distillation
from csdraft.trainers.on_policy import OnPolicy
from csdraft.trainers.publish import describe
from csdraft.trainers.split import evaluating
from csdraft.trainers.students import load_student_weights, save_student

__all__ = ["DistillArguments", "DrafterTrainer", "evaluation_of"]

QUOTED = 16
"""Tokens at the start of a row that messages quote."""


class DrafterTrainer(BaseTrainer):
    """Trains a student on a frozen target's distributions, evaluates it by decoding, and saves it as a drafter.

    Args:
        model: the student to train, from `csdraft.trainers.students.make_student`. `trainer.model` is this object.
        args: see `DistillArguments`.
        train_dataset: `Texts`, from `csdraft.trainers.run.prepare`.
        data_collator: makes a batch of its items; None: as `Texts.collator`.
        eval_dataset: token ids of the prompts that `evaluate` decodes, if `evaluation` is None.
        processing_class: the tokenizer, which is saved with the student.
        target: frozen, and not changed.
        evaluation: what `evaluate` runs; made from `eval_dataset` and `args` if None. Without either, `evaluate`
            raises an error.
        options: of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DistillArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Sequence[Sequence[int]] | None = None,
        processing_class: Any = None,
        *,
        target: nn.Module,
        evaluation: Evaluation | None = None,
        **options: Any,
    ):
        _check_given(train_dataset, options)
        texts = train_dataset if isinstance(train_dataset, Texts) else None
        data_collator = data_collator or (texts and texts.collator)
        self._pad = pad_of(processing_class, target.config)
        vocab = target.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
        self._on_policy = OnPolicy(args.on_policy, args.on_policy_prompt, args.temperature, self._pad, vocab)
        self.evaluation = evaluation or evaluation_of(args, eval_dataset, self._pad)
        eval_dataset = self.evaluation and self.evaluation.prompts
        args._setup_devices  # noqa: B018 - counts the GPUs
        args._n_gpu = min(args._n_gpu, 1)  # DataParallel's replicas would be on other devices than the target
        cached = texts.cache.taps if texts and isinstance(texts.cache, FeatureCache) else ()
        self._pair = Distillation(model, target, args.objective, cached)
        options |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": data_collator}
        super().__init__(self._pair, args, processing_class=processing_class, **options)
        self.model = self.callback_handler.model = model
        if not vars(base_model(model)).get("peft_config"):  # the trained model must not keep the name of its start
            model.config.name_or_path, model.config._commit_hash = args.output_dir, None  # type: ignore[union-attr]
        self._copy = copy.deepcopy(model).to(args.device) if keeps_parts(self) else None
        self.loss_is_scaled_for_ga = True  # by the number of labels of the whole step
        if placed_here(target):
            target.to(args.device)
        for each in (target, model) if texts and texts.packed else ():
            if not isinstance(each, FeatureModel):  # a head has a mask that separates texts
                with evaluating(each):
                    check_packing(each)
        if texts:
            self._check_vocabularies(*largest_of(texts.rows))

    @property
    def student(self) -> nn.Module:
        """The same as `model`, under every engine."""
        return self._pair.student

    @property
    def target(self) -> nn.Module:
        return self._pair.target

    def models(self) -> list[tuple[str, nn.Module]]:
        return [("The target", self.target), ("The student", self.student)]

    def _check_vocabularies(self, largest: int, row: int) -> None:
        """Raises ValueError if a model lacks a token of the texts, which it could not read."""
        for what, model in self.models():
            vocab = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
            if largest >= vocab:
                raise ValueError(
                    f"{what} has a vocabulary of {vocab}, and row {row} has token {largest}; use the tokenizer that "
                    "belongs to the model, or resize its embedding"
                )

    def rows_of(self, item: int) -> list[int]:
        texts: Any = self.train_dataset.data  # type: ignore[union-attr]
        return texts.blocks[item] if isinstance(texts, Texts) else [item]

    def begin_of(self, row: int) -> str:
        texts: Any = self.train_dataset.data  # type: ignore[union-attr]
        known = isinstance(texts, Texts) and self.processing_class is not None
        return self.processing_class.decode(texts.rows[row]["input_ids"][:QUOTED]) if known else ""  # type: ignore[union-attr]

    # Engines wrap and checkpoint the student together with its loss: the loss needs whole parameters.

    @contextmanager
    def _as_pair(self) -> Iterator[None]:
        """While entered, `model` is the student with its loss, for the code of transformers that wraps or saves it."""
        before, self.model = self.model, self._pair
        if self.model_wrapped is before:
            self.model_wrapped = self._pair
        try:
            yield
        finally:
            self.model = self.callback_handler.model = before

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        with self._as_pair():
            return super()._prepare_for_training(*args, **options)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        with self._as_pair():
            super()._save_checkpoint(*args, **options)

    def save_model(self, *args: Any, **options: Any) -> None:
        with self._as_pair():
            super().save_model(*args, **options)

    def trained(self) -> nn.Module:
        return self.student

    # A step: its batches, the number of their labels, the loss.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if self.args.on_policy > 0:  # type: ignore[union-attr]
            keys = self.args.seed, self.state.global_step
            with self.decoding() as student:
                batches = [self._on_policy.rewritten(batch, student, keys) for batch in batches]
        count = sum((scored(batch).sum() for batch in batches), torch.zeros((), dtype=torch.long, device=device))
        return batches, self.accelerator.gather(count.reshape(1)).sum().clamp(min=1)  # type: ignore[union-attr]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total = scored(inputs).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = model(**inputs, total=total)
        if num_items_in_batch is not None:  # gradients of the processes are averaged, not summed
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    @contextmanager
    def decoding(self) -> Iterator[nn.Module]:
        """The student in eval mode, to decode with. Leaves the global random state unchanged.

        If an engine shards the student, this is a whole copy of it: every process must enter.
        """
        student, training = self.student, self.student.training
        if self._copy is not None:
            copy_whole(self.student, self._copy)
            student, training = self._copy, self._copy.training
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            student.eval()
            try:
                yield student
            finally:
                student.train(training)

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Acceptance and block efficiency on the held-out prompts, or on others; see `Evaluation.grade`."""
        evaluation = evaluation_of(self.args, eval_dataset, self._pad) or self.evaluation  # type: ignore[arg-type]
        if evaluation is None:
            raise ValueError("there are no prompts to evaluate on: give eval_prompts=FILE (or evaluation=)")
        # All processes must run a sharded target together, so each evaluates all prompts: the ratios stay the same.
        part = slice(None) if is_sharded(self.target) else slice(self.args.process_index, None, self.args.world_size)
        with self.decoding() as student:
            sums = evaluation.run(self.target, student, part)
        total: Any = Counter()
        for other in gather_object([sums]):
            total.update(other)
        figures = evaluation.grade(total)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **options: Any) -> Any:
        raise ValueError("a drafter predicts no labels; evaluate() gives its figures on prompts")

    # Checkpoints hold the student alone, in a folder that loads without this class.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {name.removeprefix("student."): value for name, value in state_dict.items()}
        if self.args.should_save:
            save_student(self.student, output_dir or self.args.output_dir, self.processing_class, state_dict)

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
            with self._as_pair():
                return super()._load_best_model()
        load_student_weights(self.student, self.state.best_model_checkpoint)


def _check_given(texts: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError for data that cannot be trained on, and for options without effect."""
    for name in {"compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"} & options.keys():
        raise ValueError(f"{name}= has no effect: losses are those of args, figures those of evaluate(); leave it out")
    if texts is not None and "labels" not in (texts[0] if isinstance(texts, Sized) and len(texts) else ()):  # type: ignore[index]
        raise ValueError(f"train_dataset={type(texts).__name__}: give Texts, as csdraft.trainers.run.prepare does")


def evaluation_of(args: DistillArguments, prompts: Sequence[Sequence[int]] | None, pad: int) -> Evaluation | None:
    """The evaluation on these prompts, padded with this token; None without prompts."""
    if prompts is None:
        return None
    if not prompts or any(isinstance(each, str | Mapping) or not len(each) for each in prompts):
        raise ValueError(
            f"eval_dataset={type(prompts).__name__} must be lists of token ids, one prompt or more and none empty, as "
            "csdraft.data.sources.read_prompts gives; evaluate() takes further sets"
        )
    options = args.eval_depth, args.eval_new_tokens, args.temperature, args.eval_batch_size
    return Evaluation(prompts, pad, *options)


def scored(batch: dict[str, Tensor]) -> Tensor:
    """True where a batch has a label. The first token of a decoder-only row is not predicted."""
    labels = batch["labels"]
    return (labels if "decoder_input_ids" in batch else labels[:, 1:]) != IGNORED
