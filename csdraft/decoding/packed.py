"""Linear layers on a CPU, with weights in the layout that oneDNN's kernels read.

PyTorch (2.13) hands oneDNN each weight in its own layout, and oneDNN brings it into the kernels' layout again in every
forward. So one token of a 135M model in bfloat16 takes twice as long as reading its weights, and in float32 two tokens
take twice as long as one. Here the model's forwards run on a twin of its modules. The twin has the same parameters and
buffers, and a second copy of the large weights in that layout (`PackedLinear`). In bfloat16 the results are the same
bits; in float32 sums are added up in another order, as they are for another number of tokens.

The user's model is not touched. A twin is kept as long as its model, and made again if the model has changed.
"""

from __future__ import annotations

import platform
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from csdraft.decoding.states import memory_of, setting_of

__all__ = ["held_packed", "packed", "release_packed"]

LEAST = 100_000
"""Weights with fewer numbers stay as they are: their multiplication takes little longer than the call."""
SHARE = 0.25
"""The share of the memory that all packed weights together may take."""
QUERIES = 8
"""The number of rows of the input that the layout is chosen for."""
REPEATED, LONG = 4, 4096
"""In float32 one row is multiplied REPEATED times, which is faster than once; if it is longer than LONG, as ever."""


class PackedLinear(nn.Linear):
    """A linear layer of a twin.

    Attributes:
        packed: the weight in oneDNN's layout, an opaque tensor.
    """

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        if input.dtype != self.weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if input.dtype != torch.float32 or input.numel() > self.in_features:
            return self._multiplied(input)
        if self.in_features > LONG:
            return super().forward(input)
        repeated = input.reshape(1, -1).expand(REPEATED, -1)  # (REPEATED, in_features)
        return self._multiplied(repeated)[:1].reshape(*input.shape[:-1], self.out_features)

    def _multiplied(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(input, self.packed, self.bias, "none", [], "")


@dataclass(frozen=True)
class Twin:
    """What is kept for a model.

    Attributes:
        made_from: the model's settings and parameters at that time.
        module: the modules with packed weights; None if there are none.
        tried: whether they were to be made. They are not when a model has just changed: it may be in training.
    """

    made_from: Any
    module: nn.Module | None
    tried: bool = True


_twins: WeakKeyDictionary[nn.Module, Twin] = WeakKeyDictionary()
_LOCK = threading.RLock()  # reentrant: a model may be freed while this thread holds it


def packed(model: nn.Module) -> nn.Module:
    """What runs a model's forwards: its twin with packed weights, or the model itself where that is not possible.

    That is for models on other devices, in training mode, with hooks, or too large for a second copy of their weights.
    """
    if not _has_kernels() or not _is_plain(model):
        return model
    with _LOCK:
        now, known = (setting_of(model), _places(model), _sums(model)), _twins.get(model)
        if known is not None and known.made_from != now:
            known = _twins[model] = Twin(now, None, tried=False)
        elif known is None or not known.tried:
            known = _twins[model] = Twin(now, _twin(model))
        return model if known.module is None else known.module


@cache
def _has_kernels() -> bool:
    """Whether this machine has oneDNN's kernels, and they are known to be faster."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def _places(model: nn.Module) -> list[int]:
    """The addresses of all parameters and buffers."""
    return [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]


def _sums(model: nn.Module) -> list[int]:
    """Of each weight that can be packed, the sum of its bits: a write in place, however it was made, changes it."""
    weights = [module.weight for module in model.modules() if _is_packable(module)]
    sums = [weight.detach().flatten().view(torch.int64).sum() for weight in weights]
    return torch.stack(sums).tolist() if sums else []


def _is_plain(model: nn.Module) -> bool:
    """Whether the forward is that of the model's classes, on one CPU: no hooks, no functions set on a module."""
    own = [vars(module) for module in model.modules()]
    changed = any("forward" in of or of["_forward_hooks"] or of["_forward_pre_hooks"] for of in own)
    return (
        not changed and not model.training and all(parameter.device.type == "cpu" for parameter in model.parameters())
    )


def _twin(model: nn.Module) -> nn.Module | None:
    """The model's modules once more, with packed weights; None if there is nothing to pack, or not enough memory."""
    size = sum(_bytes(module.weight) for module in model.modules() if _is_packable(module))
    if not size or size + held_packed() > SHARE * memory_of(torch.device("cpu")):
        return None
    twins: dict[Any, nn.Module] = {module: type(module).__new__(type(module)) for module in model.modules()}
    for module, twin in twins.items():
        twin.__dict__.update({name: _in_twin(value, twins) for name, value in vars(module).items()})
        if _is_packable(module):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), QUERIES)
            twin.__class__ = PackedLinear
            twin.packed = packed  # type: ignore[assignment]
    return twins[model]


def _in_twin(value: Any, twins: dict[Any, nn.Module]) -> Any:
    """An attribute of a module as its twin has it: modules are twins, and containers belong to one of the two."""
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _in_twin(value.__self__, twins))
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _in_twin(one, twins)) for key, one in value.items())
    if type(value) in (list, tuple):
        return type(value)(_in_twin(one, twins) for one in value)
    return value


def _is_packable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.numel() >= LEAST
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.is_contiguous()
        and module.weight.numel() % 4 == 0  # its bits can be read as int64
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held_packed(model: nn.Module | None = None) -> int:
    """Bytes of the packed weights of one model, or of all."""
    with _LOCK:
        twins = [
            twin.module for of, twin in _twins.items() if twin.module is not None and (model is None or of is model)
        ]
    return sum(_bytes(module.weight) for twin in twins for module in twin.modules() if type(module) is PackedLinear)


def release_packed(model: nn.Module | None = None) -> int:
    """Frees the packed weights of one model, or of all; returns their bytes."""
    with _LOCK:
        freed = held_packed(model)
        for of in [of for of in _twins if model is None or of is model]:
            del _twins[of]
    return freed
