"""Records a forward of one shape once and replays it: on a GPU a replay costs one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from csdraft.decoding import clock
from csdraft.decoding.inputs import Shape

if TYPE_CHECKING:
    from csdraft.decoding.reader import Reader

__all__ = ["FEWEST_SLOTS", "RECORDERS", "Graphs", "Mode", "bucket", "forward", "make_graphs", "slots_bucket"]

ASKED = 3
"""A shape is recorded when it is needed for this time."""
MOST = 64
"""The most recorded shapes of one reader; the least recently used is dropped."""
WARM_UPS = 2
"""Runs before a recording, in which libraries choose their kernels and workspaces."""
FEWEST_SLOTS = 256
"""The fewest slots that a forward of fixed shape sees and that a cache reserves."""
MOST_COMPILED = 1024
"""The most shapes that torch.compile keeps for one function; by default it falls back to eager after 8."""

Mode = Literal["auto", "compile", False]
"""How forwards run: recorded where the device can, on a CPU with packed weights; compiled; or the model's own."""
Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]
Forward = Callable[[nn.Module, dict[str, Any]], Any]


def forward(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """The model's output."""
    return model(**arguments, use_cache=True, return_dict=True)


def bucket(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count`, but not below `least`."""
    return max(1 << max(count - 1, 0).bit_length(), least)


def slots_bucket(count: int, capacity: int) -> int:
    """How many slots a forward of fixed shape sees: 256, 512, 1,024, ..., at most `capacity`."""
    return min(bucket(count, FEWEST_SLOTS), capacity)


class Graphs:
    """The recorded forwards of one reader.

    All of them read and write the same tensors: the model's weights, the inputs of their shape and the cache. When one
    of these moves to another address, `clear` must be called.

    Args:
        record: records a body and returns a function that replays it; raises RuntimeError if it cannot. None: nothing
            is recorded.
        forward: the model's forward, perhaps compiled.
        why_not: why nothing can be recorded, if that is known beforehand.
        costs: is filled with the seconds of a replay, by recorded shape.
        device: the device whose memory is counted.

    Attributes:
        why_not: why a forward could not be recorded, in one line; from then on nothing is. None if there was no
            failure.
        seconds: time spent recording.
        bytes: device memory that the recordings take.
    """

    def __init__(
        self,
        record: Record | None,
        forward: Forward = forward,
        why_not: str | None = None,
        costs: dict[Shape, float] | None = None,
        device: torch.device | None = None,
    ):
        self.record, self.forward, self.why_not = record, forward, why_not
        self.costs, self.device = {} if costs is None else costs, device
        self.seconds, self.bytes = 0.0, 0
        self._asked: dict[Shape, int] = {}
        self._replays: dict[Shape, Replay] = {}

    @property
    def shapes(self) -> list[Shape]:
        """The recorded shapes."""
        return list(self._replays)

    def is_warm(self, shape: Shape) -> bool:
        """Whether the next run of a shape is as fast as later ones."""
        if self.record is None or self.why_not is not None:
            return shape in self._asked
        return shape in self._replays

    def run(self, shape: Shape, body: Replay, at_once: bool = False) -> Tensor:
        """The result of `body`, from a replay if the shape is recorded. The next replay may overwrite it.

        Args:
            at_once: whether to record a shape the first time it is needed.
        """
        if shape in self._replays:
            replay = self._replays[shape] = self._replays.pop(shape)  # moves it to the end
            return replay()
        self._asked[shape] = self._asked.get(shape, 0) + 1
        ripe = at_once or self._asked[shape] >= ASKED
        if not ripe or self.record is None or self.why_not is not None:
            return body()
        started, taken = clock.now(), self._reserved()
        while len(self._replays) >= MOST:
            oldest = next(iter(self._replays))
            del self._replays[oldest], self._asked[oldest]
        try:
            replay = self._replays[shape] = self.record(body)
        except RuntimeError as error:
            self.why_not = str(error).strip().split("\n")[0]
            return body()
        finally:
            self.seconds += clock.now() - started
            self.bytes += max(self._reserved() - taken, 0)
        self.costs[shape] = min(_seconds(replay) for _ in range(WARM_UPS))
        return replay()

    def _reserved(self) -> int:
        """Bytes of GPU memory that torch needs; 0 on other devices."""
        if self.device is None or self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()  # as a recording does: else what it frees would be taken off its own bytes
        return torch.cuda.memory_reserved(self.device)

    def clear(self) -> None:
        """Drops all recordings. Called when a tensor has moved."""
        self._replays.clear()
        self._asked.clear()
        self.bytes = 0


def _seconds(replay: Replay) -> float:
    """Seconds until the result of a replay can be read."""
    started = clock.now()
    float(replay().flatten()[0])
    return clock.now() - started


def make_graphs(reader: Reader, mode: Mode) -> Graphs | None:
    """The graphs of a reader; None if its shapes are exact and its forwards eager."""
    record = RECORDERS.get(reader.device.type)
    if mode is False or (record is None and mode != "compile"):
        return None
    way = compiled() if mode == "compile" else forward
    return Graphs(record and record(reader), way, _why_not(reader.model), reader.costs, reader.device)


def _why_not(model: nn.Module) -> str | None:
    """Why a model's forwards cannot be recorded, as far as its weights show it."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return f"its weights are on {len(devices)} devices ({', '.join(sorted(map(str, devices)))})"
    return None


def compiled() -> Forward:
    """A compiled forward: each shape is compiled when it first runs."""
    way = torch.compile(forward, dynamic=False)

    def run(model: nn.Module, arguments: dict[str, Any]) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, accumulated_recompile_limit=MOST_COMPILED):
            return way(model, arguments)

    return run


class OnDeviceOnly(TorchDispatchMode):
    """Raises an error for operators that cannot be recorded. A recording that fails half way breaks CUDA's state."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        counted = name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if name in HOST or counted or (name in COPIES and between_devices(args, kwargs)) or by_mask(name, args):
            raise RuntimeError(f"{func} in a recorded forward: a value passes between host and device")
        return func(*args, **kwargs)


HOST = {
    "aten._local_scalar_dense.default", "aten.lift_fresh.default", "aten.nonzero.default", "aten.equal.default",
    "aten.masked_select.default", "aten._unique2.default", "aten._unique.default", "aten.unique_consecutive.default",
    "aten.bincount.default", "aten.histc.default",
}  # fmt: skip
"""Operators that copy a value from or to the host, or whose result has a shape that depends on values."""
COPIES = {"aten._to_copy.default", "aten.copy_.default"}


def between_devices(args: Any, kwargs: Any) -> bool:
    """Whether a copy's source and target are on different devices."""
    types = {value.device.type for value in args if isinstance(value, Tensor)}
    return len(types | ({torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set())) > 1


def by_mask(name: str, args: Any) -> bool:
    """Whether an operator indexes with a bool mask, so that a shape depends on values."""
    if not name.startswith(("aten.index.Tensor", "aten.index_put")):
        return False
    one = "put" in name and args[2].numel() == 1  # a scalar is filled in without counting
    return not one and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def check_on_device(body: Replay) -> None:
    """Runs a body once; raises RuntimeError if it cannot be recorded."""
    # Eager: dynamo would never compile a frame again that it first meets under a dispatch mode.
    with torch.compiler.set_stance("force_eager"), OnDeviceOnly():
        body()


_RECORDING = threading.Lock()
"""CUDA captures one graph at a time in a process."""


def record_cuda(reader: Reader) -> Record:
    """Records CUDA graphs that share memory, since they never run at the same time."""
    device = reader.device
    stream = torch.cuda.Stream(device)  # the default stream belongs to the device that was used first
    alive: WeakSet[Any] = WeakSet()
    pool: Any = None

    def record(body: Replay) -> Replay:
        nonlocal pool
        check_on_device(body)
        if not alive:  # a pool without graphs cannot be used again
            pool = torch.cuda.graph_pool_handle()
        # A recording that fails half way returns to the outer stream.
        with _RECORDING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = body()
        alive.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


RECORDERS: dict[str, Callable[[Reader], Record]] = {"cuda": record_cuda}
"""Device type -> what makes its recorder."""
