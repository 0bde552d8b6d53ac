"""A stand-in for CUDA graphs on a CPU: it records the operators of a forward and replays them on the same tensors.

It forbids what CUDA graphs forbid, and notices what they would pass over in silence:

* a value that the host reads from a tensor, or a tensor made from values of the host: refused when recorded;
* a tensor from outside that is not of those that live on (weights, cache, inputs): it would be gone at a replay;
* a tensor from outside that lies elsewhere at a replay: its graph would read and write freed memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import csdraft
from csdraft.decoding.graphs import HOST, RECORDERS
from csdraft.decoding.reader import Reader


class Recorder(TorchDispatchMode):
    """Notes every operator with its arguments; tensors that operators made are numbered.

    Args:
        lasting: storages of the tensors that outlive a forward.
    """

    def __init__(self, lasting: Callable[[], set[int]]):
        super().__init__()
        self.lasting = lasting
        self.steps: list[tuple[Any, list, Any, list[int | None]]] = []
        self.outside: dict[int, tuple[Tensor, int]] = {}  # by number
        self._numbers: dict[int, int] = {}  # by id of a tensor that is kept alive
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in HOST:
            raise RuntimeError(f"{func} in a recorded forward: a value passes between host and device")
        kwargs = kwargs or {}
        known = set(self._numbers)
        flat, form = tree_flatten((args, kwargs))
        noted = [self._number(value, known) if isinstance(value, Tensor) else value for value in flat]
        result = func(*args, **kwargs)
        outputs = [self._new(value) if isinstance(value, Tensor) else None for value in tree_flatten(result)[0]]
        self.steps.append((func, noted, form, outputs))
        return result

    def _number(self, tensor: Tensor, known: set[int]) -> Number:
        if id(tensor) not in known:
            self.outside[self._new(tensor)] = tensor, tensor.data_ptr()
        return Number(self._numbers[id(tensor)])

    def _new(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._numbers[id(tensor)]

    def number_of(self, tensor: Tensor) -> int:
        return self._numbers[id(tensor)]


class Number(int):
    """Of a tensor on the tape."""


def recorder(lasting: Callable[[], set[int]]) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]]:
    """What `Graphs` takes for a CPU.

    Args:
        lasting: the storages of all tensors that outlive a forward: weights and buffers, cache, inputs.
    """

    def record(body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        body()
        with Recorder(lasting) as tape:
            result = body()
        last = tape.number_of(result)
        for tensor, _ in tape.outside.values():
            if tensor.untyped_storage().data_ptr() not in lasting():
                raise AssertionError(f"a tensor {tuple(tensor.shape)} was made outside the recorded forward")

        def replay() -> Tensor:
            where = lasting()
            values: dict[int, Tensor] = {}
            for number, (tensor, address) in tape.outside.items():
                if tensor.untyped_storage().data_ptr() not in where or tensor.data_ptr() != address:
                    raise AssertionError(f"a tensor {tuple(tensor.shape)} of a recorded forward lies elsewhere now")
                values[number] = tensor
            for func, noted, form, outputs in tape.steps:
                flat = [values[value] if isinstance(value, Number) else value for value in noted]
                args, kwargs = tree_unflatten(flat, form)
                made = tree_flatten(func(*args, **kwargs))[0]
                values |= {n: tensor for n, tensor in zip(outputs, made, strict=True) if n is not None}
            return values[last]

        return replay

    return record


def storages(reader: Reader) -> set[int]:
    """Of all tensors that outlive a forward of a reader: its inputs and its cache, and whatever the model holds."""
    cache, model = reader.cache, reader.model
    tensors = [inputs._there for inputs in reader._buffers.values()]
    tensors += [inputs.features for inputs in reader._buffers.values() if inputs.features is not None]
    tensors += [reader._steps, reader._prompts]
    tensors += [buffer for layer in cache._filled() for buffer in (layer.key_buffer, layer.value_buffer)]
    tensors += [] if cache.positions is None else [cache.positions]
    tensors += [*cache.features.values(), *model.parameters(), *model.buffers()]
    tensors += [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def stand_in(patch: pytest.MonkeyPatch) -> Iterator[list[Reader]]:
    """Takes the place of CUDA graphs on the CPU while a test runs; yields the readers that have recorded something."""
    csdraft.release()
    readers: list[Reader] = []

    def record(reader: Reader) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]]:
        readers.append(reader)
        return recorder(lambda: storages(reader))

    patch.setitem(RECORDERS, "cpu", record)
    yield readers
    csdraft.release()
