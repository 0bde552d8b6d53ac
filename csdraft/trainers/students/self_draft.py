"""Self-drafting: LoRA (arXiv 2106.09685) on some of the target's own layers, which are in memory anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from csdraft.heads.self_draft import own_layers
from csdraft.trainers.engines import chosen_engine
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.cut import check_cut
from csdraft.trainers.students.lora import with_lora

__all__ = ["SelfDrafting", "check_engine"]


class SelfDrafting(Student):
    """See `Student`."""

    rate = 4e-4
    needs_target = shares_target = True

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        check_cut(config, options["cut"])
        _check_shared(options["cut"], options["peft"])
        check_engine(True)

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        cut = options["cut"]
        return with_lora(own_layers(target, cut["layers"], cut.get("encoder_layers")), options["peft"])


def _check_shared(cut: Mapping[str, Any], peft: Mapping[str, Any] | None) -> None:
    """Raises ValueError for options that an adapter on the target's own layers cannot have."""
    if cut.get("tie_to_target"):
        raise ValueError(
            "shared: true with tie_to_target: shared layers are the target's own, and tie_to_target is for copies of "
            "them; leave one out"
        )
    if not peft:
        raise ValueError(
            "shared: true needs peft, such as peft: {r: 64, lora_alpha: 128}: the layers are the target's own and do "
            "not change, so an adapter on them is trained; to train copies of them, leave shared out"
        )
    if (bias := peft.get("bias", "none")) != "none":
        raise ValueError(f"peft.bias={bias!r}: on shared weights it would change the target's own; leave it out")


def check_engine(shared: bool, deepspeed: Any = None, fsdp: Any = None) -> None:
    """Raises ValueError if a student with the target's own layers would be trained by an engine that shards it.

    Args:
        shared: whether the student has the target's own layers.
        deepspeed, fsdp: of `TrainingArguments`. The choice of `accelerate launch` is read from the environment.
    """
    if shared and (engine := chosen_engine(deepspeed, fsdp)):
        raise ValueError(
            f"a self-drafting student cannot be trained under {engine}: its layers are the target's own tensors, "
            "which the engine (ZeRO, FSDP) would shard or move as the student's. Use DDP or one process, or give "
            "the student layers of its own: init: {from_target: {layers: [...]}}"
        )
