"""Arguments shared by the scripts that only read a target: which target, which data, and where results go."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from csdraft.data.chat import ChatFormat
from csdraft.data.shards import Part

__all__ = [
    "DataArguments", "TargetArguments", "check_at_least", "check_context", "check_writable", "load_weights", "option",
    "read_target", "target_name",
]  # fmt: skip


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments; `help` goes into the script's `--help` and the docs."""
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def read_target(args: Any) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config and tokenizer of `args.target`, which are small; most checks need nothing else."""
    dtype = str(getattr(args, "target_dtype", "auto")).removeprefix("torch.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"target_dtype={dtype!r} must be auto or a dtype of torch, such as bfloat16")
    options = {"revision": args.target_revision} if args.target_revision else {}
    return AutoConfig.from_pretrained(args.target, **options), AutoTokenizer.from_pretrained(args.target, **options)


def load_weights(args: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """The target, loaded with these options of `from_pretrained`; options that are None are left out."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"revision": args.target_revision, **options}
    return auto.from_pretrained(args.target, **{key: value for key, value in options.items() if value is not None})


def target_name(args: Any) -> str:
    """The target's unique name on this machine: a folder's absolute path, or a Hub id and its revision."""
    if Path(args.target).is_dir():
        return str(Path(args.target).resolve())
    return f"{args.target}@{args.target_revision}" if args.target_revision else args.target


def check_at_least(args: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of these arguments is too small; any may be none."""
    for name in names:
        if (value := getattr(args, name)) is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_context(max_length: int, config: Any, whose: str = "target") -> None:
    """Raises ValueError if rows of `max_length` tokens do not fit into the context of a model with this config."""
    context = getattr(config, "max_position_embeddings", None)
    if context and max_length > context:
        raise ValueError(f"max_length={max_length} is longer than the {whose}'s context of {context} tokens")


def check_writable(folder: str | None) -> Path:
    """Creates the folder if need be; raises ValueError if nothing can be written into it."""
    try:
        Path(folder or "").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={folder!r} cannot be written ({error}); give a folder of your own") from error
    return Path(folder or "")


@dataclass
class DataArguments:
    """A target, and the data that it reads."""

    target: str = option("models/smol-target", "Folder or Hub id of the target.")
    target_revision: str | None = option(None, "Branch, tag or commit of the target.")
    target_dtype: str = option("auto", "dtype of the target's weights.")
    target_device_map: str | None = option(
        None, "Where the target's layers go, such as 'auto'; none is one device, in training the student's."
    )
    dataset: str = option("stdlib", "Data: a Hub id, a file, a folder, or 'stdlib'.")
    dataset_limit: int | None = option(None, "Texts, prompts or conversations that are read at most; none is all.")
    split: str = option("train", "Split of the data set.")
    chat_template: str | None = option(None, "Chat template: a file, its text or its name; none is the tokenizer's.")
    chat_template_options: dict | None = option(
        None, "What the template reads besides messages, such as {enable_thinking: false}, or tools."
    )

    @property
    def chat(self) -> ChatFormat:
        """How conversations become tokens; ValueError if a setting is wrong."""
        return ChatFormat.read(self.chat_template, self.chat_template_options)


@dataclass
class TargetArguments(DataArguments):
    """What the scripts take that only read a target: how, and where results go."""

    output_dir: str = option("", "Folder for the results; a run continues from what it holds.")
    batch_size: int = option(8, "Rows that are decoded or read at once.")
    threads: int | None = option(None, "Threads of torch on the CPU; none leaves torch's default.")
    rank: int | None = option(None, "Number of this process; none asks accelerate's environment.")
    world_size: int | None = option(None, "How many processes share the rows; none asks accelerate's environment.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "dataset_limit", "threads")
        _ = self.chat  # raises ValueError now, before the target is loaded
        if not self.output_dir:
            raise ValueError("output_dir is missing: name a folder for the results")
        if not 0 <= self.part.rank < self.part.world_size:
            raise ValueError(f"rank={self.part.rank} must be from 0 to world_size - 1 = {self.part.world_size - 1}")

    @property
    def part(self) -> Part:
        """Which process this is, and of how many."""
        found = Part.of_environment()
        rank = found.rank if self.rank is None else self.rank
        return found._replace(rank=rank, world_size=found.world_size if self.world_size is None else self.world_size)

    def load_target(self) -> Any:
        """The target in eval mode; each process on a machine uses its own CUDA device, if there is one."""
        config, _ = read_target(self)
        target = load_weights(self, config, dtype=self.target_dtype, device_map=self.target_device_map).eval()
        if self.target_device_map is not None:
            return target
        device = f"cuda:{self.part.local_rank}" if torch.cuda.is_available() else "cpu"
        return target.to(device)  # type: ignore[arg-type]
