"""Self-drafting: LoRA (arXiv 2106.09685) on some of the target's own layers, which are in memory anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from csdraft.heads.self_draft import own_layers
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.cut import Cut
from csdraft.trainers.students.lora import with_lora

__all__ = ["SelfDrafting"]


class SelfDrafting(Student):
    """LoRA on the target's own layers. See `Student`."""

    rate = 4e-4
    needs_target = shares_target = True

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        cut, peft = options["cut"], options["peft"]
        Cut().check(config, cut)
        if cut.get("tie_to_target"):
            raise ValueError(
                "shared: true with tie_to_target: shared layers are the target's own, and tie_to_target is for copies "
                "of them; leave one out"
            )
        if not peft:
            raise ValueError(
                "shared: true needs peft, such as peft: {r: 64, lora_alpha: 128}: the layers are the target's own and "
                "do not change, so an adapter on them is trained; to train copies of them, leave shared out"
            )
        if (bias := peft.get("bias", "none")) != "none":
            raise ValueError(f"peft.bias={bias!r}: on shared weights it would change the target's own; leave it out")

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        cut = options["cut"]
        return with_lora(own_layers(target, cut["layers"], cut.get("encoder_layers")), options["peft"])
