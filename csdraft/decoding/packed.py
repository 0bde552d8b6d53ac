"""Linear layers on a CPU, with weights in the layout that oneDNN's kernels read.

PyTorch (2.13) hands oneDNN each weight in its own layout, and oneDNN brings it into the kernels' layout again in every
forward. So a forward of a 135M model takes up to 1.8 times as long as it must (docs/cpu.md). Here the model's forwards
run on a twin of its modules. The twin has the same parameters and buffers, and a second copy of the large weights in
that layout (`PackedLinear`). In bfloat16 the results are the same bits; in float32 sums are added up in another order,
as they are for another number of tokens.

The user's model is not touched. A twin is kept as long as its model, and made again if the model has changed.
"""

from __future__ import annotations

import platform
import threading
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from csdraft.decoding.states import LEVELS, OF_ALL, PLAIN, memory_of, setting_of, tensors_of

__all__ = ["held_packed", "packed", "release_packed"]

LEAST = 100_000
"""Weights with fewer numbers stay as they are: their multiplication takes little longer than the call."""
SHARE = 0.25
"""The share of the memory that all packed weights together may take."""
QUERIES = 8
"""The number of rows of the input that the layout is chosen for."""
KNOWN = {"torch", "transformers", "peft", "csdraft", "builtins"}
"""The packages of whose classes modules and their attributes may be."""
SEGMENTS = 127, 113
"""How many words of a weight are summed up together: the first that does not divide the length of a row."""
REPEATED, LONG = 4, 4096
"""In float32 one row is multiplied REPEATED times, which is faster than once; if it is longer than LONG, as ever."""
CACHED, SMALL = 24 * 2**20, 500_000
"""A model of at most CACHED bytes stays in the processor's cache: there its weights of at most SMALL numbers, too, are
multiplied by one row in float32 as ever."""


class PackedLinear(nn.Linear):
    """A linear layer of a twin.

    Attributes:
        packed: the weight in oneDNN's layout, an opaque tensor.
        row_as_ever: whether one row in float32 is multiplied by the weight as it is.
    """

    packed: Tensor
    row_as_ever: bool

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        width, size = self.in_features, input.numel()
        if not size or (self.row_as_ever and size == width):
            return super().forward(input)
        if input.dtype != self.weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if input.dtype != torch.float32 or size > width:
            return self._multiplied(input)
        repeated = input.reshape(1, -1).expand(REPEATED, -1)  # (REPEATED, in_features)
        return self._multiplied(repeated)[0].reshape(*input.shape[:-1], -1)

    def _multiplied(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(input, self.packed, self.bias, "none", [], "")


@dataclass(frozen=True)
class Twin:
    """What is kept for a model.

    Attributes:
        made_from: the model's settings, its tensors and sums over its weights at that time.
        module: the modules with packed weights; None if there are none.
        tried: whether they were to be made. They are not when a model has just changed: it may be in training.
    """

    made_from: Any
    module: nn.Module | None
    tried: bool = True


_LINEAR = nn.Linear.forward
_twins: WeakKeyDictionary[nn.Module, Twin] = WeakKeyDictionary()
_LOCK = threading.RLock()  # reentrant: a model may be freed while this thread holds it


def packed(model: nn.Module, state: tuple | None = None, setting: tuple | None = None) -> nn.Module:
    """What runs a model's forwards: its twin with packed weights, or the model itself where that is not possible.

    That is for models on other devices, in training mode, with a user's own modules or hooks, or too large for a
    second copy of their weights.

    Args:
        state, setting: the model's `tensors_of` and `setting_of`, if they are known.
    """
    hooked = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    if hooked or nn.Linear.forward is not _LINEAR or not _has_kernels():
        return model
    setting = setting or setting_of(model)
    with _LOCK:
        known = _twins.get(model)
        has_twin = known is not None and known.module is not None
        if not (has_twin and known.made_from[0] == setting) and not _is_plain(model):  # type: ignore[union-attr]
            return model
        if not has_twin and not _fits(model):
            return model
        now = setting, state or tensors_of(model), _sums(model)
        if known is not None and known.made_from != now:
            known = _twins[model] = Twin(now, None, tried=False)
        elif known is None or not known.tried:
            known = _twins[model] = Twin(now, _twin(model))
        return model if known.module is None else known.module


@cache
def _has_kernels() -> bool:
    """Whether this machine has oneDNN's kernels, and they are known to be faster."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def _fits(model: nn.Module) -> bool:
    """Whether there is anything to pack, and memory for it."""
    size = sum(_bytes(module.weight) for module in model.modules() if _is_packable(module))
    return 0 < size <= SHARE * memory_of(torch.device("cpu")) - held_packed()


def _sums(model: nn.Module) -> list[int]:
    """A sum over the bits of each weight that can be packed: writes through `.data` count no version.

    Each segment of its 64-bit words has another odd factor. Segments do not begin where rows do, so other orders of
    rows or columns have other sums.
    """
    sums = []
    for weight in [module.weight.detach() for module in model.modules() if _is_packable(module)]:
        words = weight.view(torch.int64)  # (out_features, words of a row)
        size = next((size for size in SEGMENTS if words.shape[1] % size), SEGMENTS[0])
        words, whole = words.view(-1), words.numel() // size * size
        parts = torch.cat([words[:whole].view(-1, size).sum(1), words[whole:]])
        sums.append((parts * torch.arange(1, 2 * len(parts), 2, device="cpu")).sum())
    return torch.stack(sums).tolist() if sums else []


def _is_plain(model: nn.Module) -> bool:
    """Whether a twin would do what the model does: its modules are of known packages and run on one CPU.

    Hooks, functions set on a module, and attributes of other types, which may refer to the model, are not plain.
    """
    for module in model.modules():
        own = vars(module)
        hooks = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
        if module.training or "forward" in own or not _is_known(type(module)) or not all(map(_is_known, hooks)):
            return False
        if not all(_is_value(value) for name, value in own.items() if name not in OF_ALL):
            return False
    return {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def _is_known(made: Any) -> bool:
    """Whether a class or a hook is of a known package. transformers captures hidden states with hooks."""
    return str(getattr(made, "__module__", "")).partition(".")[0] in KNOWN


def _is_value(value: Any, levels: int = LEVELS) -> bool:
    """Whether an attribute cannot refer to the model, except by its modules and their methods."""
    if isinstance(value, dict | list | tuple):
        held = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_value(one, levels - 1) for one in held)
    if isinstance(value, partial):
        return not isinstance(value.func, MethodType) and _is_value([value.func, *value.args, value.keywords])
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    simple = isinstance(value, PLAIN | set | frozenset | MethodType | type | Tensor | nn.Module)
    return simple or _is_known(type(value))


def _twin(model: nn.Module) -> nn.Module | None:
    """The model's modules once more, with packed weights; None if oneDNN cannot pack them."""
    twins: dict[Any, nn.Module] = {module: type(module).__new__(type(module)) for module in model.modules()}
    cached = sum(map(_bytes, model.parameters())) <= CACHED
    try:
        for module, twin in twins.items():
            own = vars(module).items()
            twin.__dict__.update({name: _in_twin(value, twins, name in OF_ALL) for name, value in own})
            if _is_packable(module):
                packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), QUERIES)
                twin.__class__ = PackedLinear
                twin.packed = packed  # type: ignore[assignment]
                as_ever = module.in_features > LONG or (cached and module.weight.numel() <= SMALL)
                twin.row_as_ever = as_ever and module.weight.dtype == torch.float32  # type: ignore[assignment]
    except (RuntimeError, MemoryError):
        return None
    return twins[model]


def _in_twin(value: Any, twins: dict[Any, nn.Module], copied: bool = False) -> Any:
    """An attribute of a module as its twin has it: modules are twins, and containers of modules are copied.

    Args:
        copied: whether to copy any container.
    """
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _in_twin(value.__self__, twins))
    if isinstance(value, dict):
        found = {key: _in_twin(one, twins) for key, one in value.items()}
        changed = any(one is not value[key] for key, one in found.items())
        if not copied and not changed:
            return value
        made = copy(value)  # it may be a defaultdict
        made.update(found)
        return made
    if type(value) in (list, tuple):
        made = [_in_twin(one, twins) for one in value]
        return type(value)(made) if any(one is not old for one, old in zip(made, value, strict=True)) else value
    return value


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    weight = module.weight
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16())
    whole = weight.layout == torch.strided and weight.is_contiguous()
    return known and whole and weight.numel() >= LEAST and weight.shape[1] * weight.element_size() % 8 == 0


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
