"""One distillation, from its arguments. Mistakes are found before any weights are loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import find_adapter_config_file

from csdraft.data.packing import IGNORED, Texts, pad_of
from csdraft.data.sources import read_prompts, read_rows
from csdraft.data.target import check_context, check_writable, load_weights, read_target, target_name
from csdraft.data.target_cache import FeatureCache, TargetCache
from csdraft.heads.folder import config_at
from csdraft.heads.self_draft import read_document
from csdraft.hub import fingerprint
from csdraft.trainers.distill import DrafterTrainer, evaluation_of
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.engines import chosen_engine, load_sharded, placed_here, uses, whole_models
from csdraft.trainers.evaluation import Evaluation
from csdraft.trainers.progress import Line
from csdraft.trainers.publish import identity
from csdraft.trainers.run_folder import RunFolder, only_run, say
from csdraft.trainers.students import check_engine, check_student, load_student_weights, make_student
from csdraft.trainers.students._student import Counts

__all__ = ["distill", "is_finished"]


def is_finished(args: DistillArguments) -> bool:
    """Whether the run is finished, on the same data; if so, prints that. No weights are read.

    Raises:
        ValueError: as `distill`.
    """
    with only_run(args.output_dir):
        run = RunFolder(args)
        if run.finished:
            run.check_data(identity(prepare(args)[2]["train_dataset"]))
            run.say_where()
        return run.finished


def distill(args: DistillArguments) -> DrafterTrainer:
    """Trains a drafter and saves it in `args.output_dir`; continues from the newest whole checkpoint there.

    `resume_from_checkpoint` chooses another one, or none (false). A finished run is not changed.

    Returns:
        The trainer, at the end of training or after a signal (`trainer.interrupt.stopped`).

    Raises:
        ValueError: arguments, data or folders cannot work, which is found before the target is loaded; or another
            run is writing to the folder.
        csdraft.trainers.stops.Stopped: a loss or gradient is not finite, or the disk is full.
    """
    with only_run(args.output_dir):
        config, tokenizer, batches = prepare(args)
        run = RunFolder(args)
        run.check_data(identity(batches["train_dataset"]))
        run.say_where()
        trainer = make_trainer(args, config, tokenizer, batches)
        if run.finished:
            run.restore(trainer, load_student_weights)
        elif run.train(trainer):
            run.finish(trainer, partial(save_result, trainer))
        return trainer


def make_trainer(
    args: DistillArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, batches: dict[str, Any]
) -> DrafterTrainer:
    """The trainer, with target and student loaded."""
    evaluation = make_evaluation(args, config, tokenizer)
    target, student = load_models(args, config, partial(counts_of, batches["train_dataset"], config))
    trainer = DrafterTrainer(
        model=student, args=args, **batches, processing_class=tokenizer, target=target, evaluation=evaluation
    )
    trainer.noted["data"] = identity(batches["train_dataset"])
    if not args.disable_tqdm:
        Line.instead_of_others(trainer)
    return trainer


def save_result(trainer: DrafterTrainer) -> None:
    """Saves the drafter and its card, and uploads them with `push_to_hub`."""
    trainer.save_model()
    if not trainer.args.push_to_hub:  # an upload writes the card first
        trainer.create_model_card()


# Before anything is loaded.


def prepare(args: DistillArguments) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, dict[str, Any]]:
    """The target's config and tokenizer, and the trainer's `train_dataset` and `data_collator`.

    Raises:
        ValueError: the arguments or the data cannot work.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    config, tokenizer = read_target(args)
    check(args, config, tokenizer)
    rows = read_rows(args.dataset, tokenizer, args.max_length, args.split, args.dataset_limit, args.chat)
    start, cache = config.decoder_start_token_id if config.is_encoder_decoder else None, None
    if args.target_cache and not RunFolder(args).finished:  # hidden states for a head, logits for a model
        cache = (FeatureCache if args.kind.reads_features else TargetCache)(args.target_cache)
        cache.check_target(target_name(args))
    texts = Texts(rows, args.max_length, pad_of(tokenizer, config), args.packing, start, cache)
    return config, tokenizer, {"train_dataset": texts, "data_collator": texts.collator}


def check(args: DistillArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for mistakes that can be found without weights and data."""
    _ = args.objective  # checks the losses
    if args.eval_prompts is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise ValueError(
            f"eval_strategy={args.eval_strategy!s} without prompts to evaluate on: give eval_prompts=FILE, or leave "
            "out eval_strategy and eval_on_start"
        )
    check_student(config, args.student, args.init, args.peft)
    check_engines(args)
    if args.on_policy and args.kind.reads_features:
        raise ValueError(
            f"on_policy={args.on_policy!r} with a head: it reads hidden states of the target, which are computed "
            "along the given texts; leave on_policy out"
        )
    if args.on_policy and args.on_policy_prompt >= args.max_length and not config.is_encoder_decoder:
        raise ValueError(
            f"on_policy_prompt={args.on_policy_prompt} leaves nothing to write in texts of max_length="
            f"{args.max_length} tokens; keep fewer"
        )
    if args.target_cache and config.is_encoder_decoder:
        raise ValueError("target_cache is for decoder-only targets; leave it out")
    check_context(args.max_length, config)
    check_writable(args.output_dir)
    folder = RunFolder(args)  # raises if the folder holds another run
    if args.student is not None and not folder.finished:
        check_start(args)
        check_tokenizers(args.student, args.target, tokenizer)


def check_engines(args: DistillArguments) -> None:
    """Raises ValueError if the chosen engine cannot train the student, or the target cannot be sharded."""
    check_engine(args.kind.shares_target, args.deepspeed, args.fsdp)
    if args.muon and (engine := chosen_engine(args.deepspeed, args.fsdp)):
        raise ValueError(f"muon=true needs whole matrices, which {engine} splits; leave muon out, or use DDP")
    version = (args.fsdp_plugin_args or {}).get("fsdp_version", int(os.environ.get("FSDP_VERSION", 1)))
    if (args.fsdp or uses("FSDP")) and version != 2:
        raise ValueError(
            f"fsdp_version={version} is not supported; set fsdp_version: 2, as recipes/accelerate/fsdp.yaml"
        )
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ:
        say(
            "accelerate launch was asked for several processes and has started one; leave out --cpu and use "
            "recipes/accelerate/cpu.yaml"
        )
    if args.target_sharded and args.world_size < 2:
        raise ValueError(
            "target_sharded=true with one process: no other process could share the weights; use accelerate launch"
        )
    if args.target_sharded and args.kind.needs_target:
        raise ValueError(
            "target_sharded=true: a student that is cut out of the target, uses its layers, or is a head with its "
            "embedding needs the target's whole weights, which no process has. For a cut student: make it in a run of "
            "one process with max_steps=1, and give its folder as student"
        )


def check_start(args: DistillArguments) -> None:
    """Raises ValueError if there is no student, or it cannot read a whole text (unknown of an adapter)."""
    try:
        own = AutoConfig.from_pretrained(args.student)
    except (OSError, ValueError) as error:
        student, found = str(args.student), None
        with suppress(OSError):
            found = config_at(student) or find_adapter_config_file(student) or read_document(student)
        if not found:
            raise ValueError(
                f"student={student!r} is neither a folder nor a Hub id within reach that has a model or an adapter "
                f"({str(error).partition(chr(10))[0]}); check the name, and the connection"
            ) from error
        return
    check_context(args.max_length, own, "student")


def check_tokenizers(student: str, target: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless student and target have the same ids for the same tokens."""
    try:
        own = AutoTokenizer.from_pretrained(student)
    except (OSError, ValueError):
        return  # without a tokenizer, the vocabulary sizes are compared when it is loaded
    if (found := fingerprint(own)) != (wanted := fingerprint(tokenizer)):
        raise ValueError(
            f"student {student} has tokenizer {found} ({len(own)} tokens), target {target} has {wanted} "
            f"({len(tokenizer)} tokens); start from a student of the target's family, or use init="
        )


def make_evaluation(
    args: DistillArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Evaluation | None:
    if args.eval_prompts is None:
        return None
    context = getattr(config, "max_position_embeddings", None)
    longest = context and context - args.eval_new_tokens - args.eval_depth
    prompts = read_prompts(args.eval_prompts, tokenizer, args.eval_limit, longest, args.eval_split, args.chat)
    return evaluation_of(args, prompts, pad_of(tokenizer, config))


def counts_of(texts: Texts, config: PreTrainedConfig) -> Tensor:
    """(vocab,) how often each token is a label in the training text."""
    counts = torch.zeros(config.get_text_config(decoder=True).vocab_size, dtype=torch.long)
    for index in range(len(texts)):
        labels = texts[index]["labels"]  # (length,)
        counts += torch.bincount(labels[labels != IGNORED], minlength=len(counts))
    return counts


# Models.


def load_models(
    args: DistillArguments, config: PreTrainedConfig, counts: Counts | None = None
) -> tuple[nn.Module, nn.Module]:
    """The frozen target, and the student in float32. For `counts` see `make_student`."""
    load = partial(
        load_weights,
        args,
        config,
        dtype=args.target_dtype,
        device_map=args.target_device_map,
        quantization_config=args.target_quantization,
    )
    with whole_models():
        target = load_sharded(load, config, args.target_dtype) if args.target_sharded else load()
        if placed_here(target):
            target.to(args.device)  # before a self-drafting student shares its weights
        set_seed(args.seed)
        return target, make_student(target, args.student, args.init, args.peft, counts)
