"""Options of all trainings, in addition to those of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

__all__ = ["RunArguments"]


@dataclass
class RunArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and the options that every training here has in addition."""

    muon: bool = field(
        default=False,
        metadata={"help": "Muon for the weight matrices, AdamW for embeddings and output layers, instead of `optim`."},
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads of torch on the CPU; none leaves torch's default."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Without effect: a loss that is not finite stops the run."}
    )

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
