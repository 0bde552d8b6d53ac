"""Options that all trainings have beside those of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

__all__ = ["RunArguments"]


@dataclass
class RunArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what a training here needs besides."""

    muon: bool = field(default=False, metadata={"help": "Muon for the weight matrices instead of `optim`."})
    threads: int | None = field(
        default=None, metadata={"help": "Threads of torch on the CPU; none leaves torch's default."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Without effect: a loss that is not finite stops the run."}
    )
