"""Which target, which data, and where results go: what the scripts that only read a target have in common."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from csdraft.data.shards import Part

__all__ = ["TargetArguments"]


@dataclass
class TargetArguments:
    """A target and data for it; names as those of `csdraft.trainers.distill.DistillArguments`."""

    target: str = field(default="models/smol-target", metadata={"help": "Folder or Hub id of the target."})
    target_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the target."})
    target_dtype: str = field(default="auto", metadata={"help": "dtype of the target's weights."})
    target_device_map: str | None = field(default=None, metadata={"help": "Such as 'auto'; None is one device."})
    dataset: str = field(default="stdlib", metadata={"help": "A Hub id, file, folder, or 'stdlib'."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Texts, prompts or conversations read at most."})
    split: str = field(default="train", metadata={"help": "Of the data set."})
    output_dir: str = field(default="", metadata={"help": "Folder for the results; a run goes on from what it holds."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once."})
    threads: int | None = field(default=None, metadata={"help": "torch CPU threads; None leaves torch's default."})
    rank: int | None = field(default=None, metadata={"help": "This process; None asks accelerate's environment."})
    world_size: int | None = field(default=None, metadata={"help": "How many processes share the rows; likewise."})

    def __post_init__(self) -> None:
        self.check_at_least(1, "batch_size")
        if not self.output_dir:
            raise ValueError("output_dir is missing: name a folder for the results")
        if not 0 <= self.part.rank < self.part.world_size:
            raise ValueError(f"rank={self.part.rank} must be from 0 to world_size - 1 = {self.part.world_size - 1}")

    def check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")

    @property
    def part(self) -> Part:
        """Which process of how many this is."""
        found = Part.of_environment()
        rank = found.rank if self.rank is None else self.rank
        return found._replace(rank=rank, world_size=found.world_size if self.world_size is None else self.world_size)

    def folder(self) -> Path:
        """`output_dir`, which is there and can be written."""
        try:
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output_dir):
                pass
        except OSError as error:
            raise ValueError(f"output_dir={self.output_dir!r} cannot be written: {error}; give another one") from error
        return Path(self.output_dir)

    def read_target(self) -> tuple[Any, Any]:
        """The target's config and tokenizer, without its weights."""
        config = AutoConfig.from_pretrained(self.target, revision=self.target_revision)
        return config, AutoTokenizer.from_pretrained(self.target, revision=self.target_revision)

    def load_target(self) -> Any:
        """The target in eval mode; each process of a machine has its own CUDA device, where there are any."""
        config, _ = self.read_target()
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {"revision": self.target_revision, "dtype": self.target_dtype}
        if self.target_device_map is not None:
            return auto.from_pretrained(self.target, device_map=self.target_device_map, **options).eval()
        target = auto.from_pretrained(self.target, **options).eval()
        device = f"cuda:{self.part.local_rank}" if torch.cuda.is_available() else "cpu"
        return target.to(device)  # type: ignore[arg-type]
