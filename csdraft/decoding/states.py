"""What a model is now: its parameters, the settings of its modules, and the device that it runs on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.decoding.names import name_of

__all__ = ["cost_label", "home", "looked_up", "memory_of", "setting_of", "state_of", "tensors_of", "ways_on"]


def tensors_of(model: nn.Module) -> tuple[tuple[int, int, torch.dtype], ...]:
    """(address, writes, dtype) of all parameters and buffers, module by module; -1 for those that count no writes."""
    own = [[*module._parameters.values(), *module._buffers.values()] for module in model.modules()]
    held: list[Any] = [tensor for tensors in own for tensor in tensors if tensor is not None]
    return tuple((one.data_ptr(), -1 if one.is_inference() else one._version, one.dtype) for one in held)


def state_of(model: nn.Module) -> tuple | None:
    """`tensors_of`, or None if changes cannot be noticed: in training mode, or if tensors do not count writes."""
    state = None if model.training else tensors_of(model)
    return None if state is None or any(writes < 0 for _, writes, _ in state) else state


def looked_up(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Copies of what these texts may read in the model's embeddings: all of small tables, such as those of positions.

    Of a large table with a row for each token, only the rows of the texts' tokens.
    """
    known = sorted({token for text in texts for token in text})
    if not known:
        return []
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tokens = torch.tensor(known, device="cpu")
    vocab: int = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[operator,union-attr]
    found = []
    for table in tables:
        weight, count = table.weight, table.num_embeddings
        if type(weight) is nn.Parameter and len(weight) == count and weight.device.type != "meta":
            by_token = count >= vocab and weight.numel() > SMALL
            rows = tokens.clamp(max=count - 1).to(weight.device) if by_token else slice(None)
            found.append(weight.detach()[rows].clone())
    return found


def setting_of(model: nn.Module) -> tuple:
    """The settings that decide which operators a forward runs: numbers, names and hooks of config and modules."""
    config: Any = model.config
    found: list[Any] = [_plain(vars(part)) for part in (config, config.get_text_config(decoder=True))]
    for module in model.modules():
        own = vars(module)
        found += [id(module), type(module), module.training, *map(id, own["_modules"].values())]
        found += [key for hooks in HOOKS for key, hook in own[hooks].items() if not _captures(hook)]
        found += [_plain(value) for key, value in own.items() if key not in IGNORED]
    return tuple(found)


SMALL = 2**20
"""A table of embeddings with at most this many numbers is copied as a whole."""
PLAIN = bool | int | float | str | None
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_ALL = frozenset(vars(nn.Module()))
"""The attributes that every module has: parameters and buffers, modules, hooks."""
OF_CALLS = {
    "_output_capturing_hooks_installed", "_compiled_call", "_last_compile_config", "_previous_max_cache_length"
}  # fmt: skip
"""Attributes that a model gets from transformers (5.24) in its first call of some kind; no forward depends on them."""
IGNORED = OF_ALL | OF_CALLS
LEVELS = 6
"""How deep containers are looked into. They may contain themselves, several times over."""


def _captures(hook: Any) -> bool:
    """Whether a hook only keeps hidden states: transformers adds it in the first forward that is asked for them."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _plain(value: Any, levels: int = LEVELS) -> Any:
    """A setting as a value that can be compared later; another object, or one below all levels, becomes its id."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict) and levels:
        return tuple((key, _plain(own, levels - 1)) for key, own in value.items())
    if isinstance(value, list | tuple | set) and levels:
        return tuple(_plain(own, levels - 1) for own in value)
    return id(value)


LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use."""


def _limit(file: Path) -> float:
    """The number of bytes in a file; infinity if there is none."""
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


def memory_of(device: torch.device) -> float:
    """Bytes of memory that a device has; infinity if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    if device.type == "cpu" and os.name == "posix":
        return min(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), *map(_limit, LIMITS))
    return math.inf


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device where a model takes its token ids, and the dtype that it computes in."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate loads the weights to this device for each forward
        device = torch.device(embeddings._hf_hook.execution_device)
    return device, model.dtype  # type: ignore[return-value]


def ways_on(device: torch.device) -> tuple[bool, torch.dtype | None]:
    """Whether inference mode is on, whose tensors cannot be used outside it, and the dtype that autocast asks for.

    Under autocast keys and values have this dtype, and a recorded forward computes in it.
    """
    cast = torch.is_autocast_enabled(device.type)
    return torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device.type) if cast else None


def cost_label(model: nn.Module) -> str:
    """A label for measured costs: the model's name, size and dtype, and its accelerator or CPU with threads."""
    device, dtype = home(model)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} with {torch.get_num_threads()} threads"
    size = sum(parameter.numel() for parameter in model.parameters())  # folders of two models may have one name
    return f"{name_of(model)} of {size} parameters in {str(dtype).removeprefix('torch.')} on {name}"
