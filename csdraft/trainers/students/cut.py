"""A model made from copies of some of the target's layers, optionally narrower or tied to the target's embedding.

DistilBERT (arXiv 1910.01108) and Minitron (arXiv 2407.14679) start from such models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from csdraft import spec
from csdraft.heads.layers import check_layers, layer_stacks, shared_layers
from csdraft.heads.tied import tie
from csdraft.trainers.students._student import Counts, Student
from csdraft.trainers.students.scratch import made_config

__all__ = ["Cut", "check_cut"]

OPTIONS = ("layers", "encoder_layers", "hidden_size", "tie_to_target", "shared")
"""Keys of `init.from_target`."""
PROBE_TOKENS = 12
"""Number of tokens on which a cut model is compared with the target's layers."""


class Cut(Student):
    """See `Student`."""

    rate = 1e-4
    needs_target = True

    def check(self, config: Any, options: Mapping[str, Any]) -> None:
        check_cut(config, options)
        if options.get("hidden_size") is not None:
            narrow_config(config, options["hidden_size"])
            if options.get("tie_to_target"):
                raise ValueError(
                    "tie_to_target with hidden_size: the target's embedding has the target's width; leave one out"
                )

    def make(self, target: Any, options: Mapping[str, Any], counts: Counts | None) -> nn.Module:
        return cut_out(target, **{key: value for key, value in options.items() if key != "shared"})


def check_cut(config: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError for unknown options, switches that are not true or false, and layers the target lacks."""
    spec.check_keys(options, OPTIONS, "init.from_target")
    for switch in ("tie_to_target", "shared"):
        if not isinstance(options.get(switch, False), bool):
            raise ValueError(f"{switch}={options[switch]!r} must be true or false")
    check_layers(config, options.get("layers"), options.get("encoder_layers"))


def narrow_config(config: Any, width: int) -> Any:
    """A copy of a config with fewer channels; ValueError if the size of attention heads would change.

    Keeping the first channels is right only if heads keep their size, so the config must state it.
    """
    head, key = (config.attribute_map.get(name, name) for name in ("head_dim", "hidden_size"))
    if head not in {field.name for field in fields(config)}:
        raise ValueError(
            f"hidden_size={width}: a {config.model_type!r} model derives the size of its heads from its width, so "
            "channels cannot be left out; leave hidden_size out, or make a new model: init: {config: {...}}"
        )
    if not isinstance(width, int) or not 0 < width <= config.hidden_size:
        raise ValueError(f"hidden_size={width!r} must be a whole number up to the target's {config.hidden_size}")
    return made_config(f"hidden_size={width}", type(config).from_dict, config.to_dict() | {key: width})


def cut_out(
    target: Any, layers: Any, encoder_layers: Any = None, hidden_size: int | None = None, tie_to_target: bool = False
) -> nn.Module:
    """A new model with copies of the target's tensors, in float32.

    A T5-like student with fewer encoder than decoder layers can draft, but plain `generate` of transformers 5.23 fails
    on it.
    """
    if getattr(target, "is_quantized", False):
        raise ValueError("the target is quantised: a student cannot start from its weights; load it in a float type")
    part = shared_layers(target, layers, encoder_layers).eval()
    plain = type(part.config).from_dict(part.config.to_dict())  # as config.json will give it
    plain = plain if hidden_size is None else narrow_config(plain, hidden_size)
    plain.name_or_path = ""
    student = type(part)(plain).to(part.dtype).eval()
    student.generation_config = copy.deepcopy(target.generation_config)
    _copy(part, student, part.config.hidden_size)
    if hidden_size is None:
        _check_alike(part, student)
    student = student.float()
    return tie(student, target) if tie_to_target else student


@torch.no_grad()
def _copy(part: nn.Module, student: nn.Module, width: int) -> None:
    """Copies tensors by name; from wider ones the first channels."""
    theirs, own = part.state_dict(), student.state_dict()
    name = type(part).__name__
    if theirs.keys() != own.keys():
        raise ValueError(f"{name} cannot be cut: with these layers it has other weights: {theirs.keys() ^ own.keys()}")
    for key, tensor in own.items():
        source = theirs[key]
        if any(a != b and a != width for a, b in zip(source.shape, tensor.shape, strict=True)):
            raise ValueError(
                f"{name} cannot be cut: its {key} has shape {tuple(source.shape)}, the student's {tuple(tensor.shape)}"
            )
        tensor.copy_(source[tuple(slice(size) for size in tensor.shape)])


@torch.no_grad()
def _check_alike(part: Any, student: Any) -> None:
    """Raises ValueError unless the student computes the same as the target's layers."""
    name = f"{type(part).__name__} ({part.config.model_type}) cannot be cut"
    for mine, theirs in zip(layer_stacks(student), layer_stacks(part), strict=True):
        for a, b in zip(mine.modules(), theirs.modules(), strict=True):
            other = [key for key, value in _options(a).items() if _options(b).get(key, value) != value]
            if other or type(a) is not type(b):
                raise ValueError(f"{name}: the config does not keep {other or type(b).__name__} of {type(b).__name__}")
    ids = torch.arange(PROBE_TOKENS)[None] % student.config.get_text_config(decoder=True).vocab_size
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if student.config.is_encoder_decoder else {})
    logits = [
        model(**{key: value.to(_device(model)) for key, value in inputs.items()}).logits.float().cpu()
        for model in (part, student)
    ]
    allowed = 1e-3 if part.dtype == torch.float32 else 0.05
    if not (logits[0] - logits[1]).abs().max() <= allowed * logits[0].abs().max():
        raise ValueError(f"{name}: a model of its cut config computes something else")


def _options(module: nn.Module) -> dict[str, Any]:
    """A module's plain public attributes."""
    plain = bool | int | float | str | None
    return {
        k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training" and not k.startswith("_")
    }


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device
