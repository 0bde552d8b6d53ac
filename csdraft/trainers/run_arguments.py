"""Options of all trainings, in addition to those of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

__all__ = ["RunArguments", "option"]


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments; `help` goes into the script's `--help` and the docs."""
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RunArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and the options that every training here has in addition."""

    muon: bool = option(
        False, "Muon for the weight matrices, AdamW for embeddings and output layers, instead of `optim`."
    )
    threads: int | None = option(None, "Threads of torch on the CPU; none leaves torch's default.")
    logging_nan_inf_filter: bool = option(False, "Without effect: a loss that is not finite stops the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps={self.max_steps} leaves nothing to train: give at least 1, or leave it out and give "
                "num_train_epochs"
            )
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} leaves nothing to train: give more than 0, or max_steps"
            )
