"""A model made from copies of some of the target's layers, optionally tied to the target's embedding.

DistilBERT (arXiv 1910.01108) and Minitron (arXiv 2407.14679) start from such models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from csdraft import spec
from csdraft.heads.layers import check_layers, layer_stacks, shared_layers
from csdraft.heads.tied import tie
from csdraft.trainers.split import close, probe
from csdraft.trainers.students._student import Counts, Student

__all__ = ["Cut"]


OPTIONS = ("layers", "encoder_layers", "tie_to_target", "shared")
"""Keys of `init.from_target`."""


class Cut(Student):
    """A model of copies of some layers, optionally tied to the target's embedding. See `Student`."""

    rate = 1e-4
    needs_target = True

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        spec.check_keys(options, OPTIONS, "init.from_target")
        for switch in ("tie_to_target", "shared"):
            if not isinstance(options.get(switch, False), bool):
                raise ValueError(f"{switch}={options[switch]!r} must be true or false")
        check_layers(config, options.get("layers"), options.get("encoder_layers"))

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        """A new model with copies of the target's tensors, in float32.

        A T5-like student with fewer encoder than decoder layers can draft, but plain `generate` of transformers 5.23
        fails on it.
        """
        if getattr(target, "is_quantized", False):
            raise ValueError(
                "the target is quantised: a student cannot start from its weights; load it in a float type"
            )
        part = shared_layers(target, options["layers"], options.get("encoder_layers")).eval()
        plain = type(part.config).from_dict(part.config.to_dict())  # as config.json will give it
        plain.name_or_path = ""
        student = type(part)(plain).to(part.dtype).eval()
        student.generation_config = copy.deepcopy(target.generation_config)
        try:
            student.load_state_dict(part.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{type(part).__name__} cannot be cut: {' '.join(str(error).split())}") from error
        _check_alike(part, student)
        student = student.float()
        return tie(student, target) if options.get("tie_to_target") else student


@torch.no_grad()
def _check_alike(part: Any, student: Any) -> None:
    """Raises ValueError unless the student computes the same as the target's layers."""
    name = f"{type(part).__name__} ({part.config.model_type}) cannot be cut"
    for mine, theirs in zip(layer_stacks(student), layer_stacks(part), strict=True):
        for a, b in zip(mine.modules(), theirs.modules(), strict=True):
            other = [key for key, value in _options(a).items() if _options(b).get(key, value) != value]
            if other or type(a) is not type(b):
                raise ValueError(f"{name}: the config does not keep {other or type(b).__name__} of {type(b).__name__}")
    if not close(student(**probe(student)).logits, part(**probe(part)).logits):
        raise ValueError(f"{name}: a model of its cut config computes something else")


def _options(module: nn.Module) -> dict[str, Any]:
    """A module's plain public attributes."""
    plain = bool | int | float | str | None
    return {
        k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training" and not k.startswith("_")
    }
