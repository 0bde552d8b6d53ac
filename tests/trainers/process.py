"""One of several processes: `scripts/distill_drafter.py`, and what this process then holds, in `held-<rank>.json`.

With FSDP on the CPU, accelerate is told that the processes have GPUs: it (1.15) starts FSDP for those alone, and DDP
for others, in silence: of the distributed types that `AcceleratorState` turns into FSDP, MULTI_CPU is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.command import leave_group
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.engines import uses
from csdraft.trainers.run import distill

start = PartialState.__init__


def start_as_gpu(self: PartialState, *args: object, **options: object) -> None:
    start(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def keep_little_whole() -> None:
    """ZeRO-3 leaves parameters of fewer elements whole; those of the tests all have fewer than its 100,000."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default = 100
    DeepSpeedZeroConfig.model_rebuild(force=True)


def held(model: nn.Module) -> float:
    """The share of a model's parameters that this process has."""
    parameters = list(model.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters) / whole


def run(words: list[str]) -> None:
    """The run of a recipe and changes to it."""
    if uses("FSDP"):
        PartialState.__init__ = start_as_gpu
    if uses("DeepSpeed"):
        keep_little_whole()
    args = read_arguments(DistillArguments, words[0], words[1:])
    trainer = distill(args)
    found = {"student": held(trainer.student), "target": held(trainer.target)}
    Path(args.output_dir, f"held-{args.process_index}.json").write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    run(sys.argv[1:])
