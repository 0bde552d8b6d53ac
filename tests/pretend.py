"""A pretended accelerator for machines without one: tensors that say they are on it and hold CPU tensors.

It shows two faults that a CPU hides: tensors of two devices that meet in one operator, and copies between a device and
its host, for each of which the host waits. It cannot show what kernels of a GPU compute, refuse or cost, nor what
graphs, streams and pinned memory do there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import csdraft

OURS = f"{Path(csdraft.__file__).parent}/"
DEVICE = "pretend"
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount")
"""Operators that bring a value to the host, or whose result has a shape that depends on values."""
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
"""Operators that take indices from either device: those on the host are copied first."""


class There(Tensor):
    """A tensor on the pretended accelerator; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=f"{DEVICE}:0", **form)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Pretended().run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def storage(self) -> Any:
        return self.held.untyped_storage()  # what is saved asks where values lie

    def __repr__(self) -> str:
        return f"There({tuple(self.shape)}, {self.dtype})"


class Pretended(TorchDispatchMode):
    """Runs operators on what their tensors hold.

    Attributes:
        copies: how often a value passed "to" the host or "from" it, by direction and the line of csdraft that did it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = {id(_held(value)): value for value in tensors}  # operators in place return what they were given
        there = any(isinstance(value, There) for value in tensors)
        device = kwargs.get("device")
        arrives = device is not None and torch.device(device).type == DEVICE
        if not there and not arrives:
            return func(*args, **kwargs)
        leaves = device is not None and not arrives
        here = [value for value in tensors if not isinstance(value, There)]
        self._check(func.overloadpacket.__name__, args, kwargs, here, leaves)
        args, kwargs = tree_map(_held, (args, kwargs))
        found = func(*args, **(kwargs | {"device": "cpu"} if arrives else kwargs))
        if leaves:
            return found
        return tree_map(lambda x: known[id(x)] if id(x) in known else There(x) if isinstance(x, Tensor) else x, found)

    def _check(self, name: str, args: Any, kwargs: Any, here: list[Tensor], leaves: bool) -> None:
        """Counts what passes between host and device; RuntimeError where a GPU would raise one."""
        awaited = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if name in WAITS or (name == "_to_copy" and leaves):
            self._note("to", 1)
        elif name in ("_to_copy", "copy_"):
            arrives = name == "_to_copy" or isinstance(args[0], There)
            self._note("from" if arrives else "to", awaited * len(here))
        elif name in INDEXED and isinstance(args[0], There):
            indices = [index for index in args[1] if index is not None]
            self._note("from", sum(not isinstance(index, There) for index in indices))
            self._note("to", sum(index.dtype == torch.bool for index in indices))
        elif shapes := [tuple(tensor.shape) for tensor in here if tensor.dim()]:
            raise RuntimeError(f"{name}: tensors of shape {shapes} are on the host, others are on {DEVICE}")

    def _note(self, direction: str, times: int) -> None:
        if times:
            frame: Any = sys._getframe()
            while frame and not frame.f_code.co_filename.startswith(OURS):
                frame = frame.f_back
            place = f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno}" if frame else "elsewhere"
            self.copies[direction, place] += times


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """The device exists, but who asks for an accelerator must not get it."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return True


class Backend(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, Backend(), Hooks())


@contextmanager
def pretended() -> Iterator[Pretended]:
    """While entered, `.to(DEVICE)` and `device=DEVICE` work; gives what counts the copies."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) copies by an operator, which is seen
    try:
        with torch.autograd.set_multithreading_enabled(False), Pretended() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
