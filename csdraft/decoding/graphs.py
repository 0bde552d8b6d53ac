"""Forwards of one shape that are recorded once and replayed: on a GPU a replay costs one launch, not hundreds."""

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
"""A shape is recorded when it has been asked for so often."""
MOST = 64
"""Recorded shapes of one reader. Who was replayed longest ago makes room."""
WARM_UPS = 2
"""Runs before a recording: libraries choose their kernels and workspaces in them."""
FEWEST_SLOTS = 256
"""What a forward of fixed shape sees at least, and a cache reserves."""
MOST_COMPILED = 1024
"""Shapes that torch.compile keeps of one function; it would continue eagerly after 8."""

Mode = Literal["auto", "compile", False]
"""How forwards of fixed shape run: recorded where the device can, also compiled, or eagerly."""
Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]
Forward = Callable[[nn.Module, dict[str, Any]], Any]


def forward(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """The model's output."""
    return model(**arguments, use_cache=True, return_dict=True)


def bucket(count: int, least: int = 1) -> int:
    """The smallest power of two that holds `count`, and at least `least`."""
    return max(1 << max(count - 1, 0).bit_length(), least)


def slots_bucket(count: int, capacity: int) -> int:
    """Slots that a forward of fixed shape sees: 256, 512, 1,024, ... but no more than there are."""
    return min(bucket(count, FEWEST_SLOTS), capacity)


class Graphs:
    """The recorded forwards of one reader.

    All of them read and write the same tensors: the model's weights, the inputs of their shape and the cache. When
    one of these moves to another address, `clear` must be called.

    Args:
        record: runs a body and returns what runs it again; raises RuntimeError if it cannot. None: none is.
        forward: of the model, compiled or not.
        why_not: why nothing can be recorded, if that is known.
        costs: takes the seconds of a replay of each recorded shape.
        device: whose memory is counted.

    Attributes:
        why_not: why a forward could not be recorded, in one line: nothing is recorded then. None if all could.
        seconds: that recording has taken.
        bytes: of the device's memory that it has taken.
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
        """What has been recorded."""
        return list(self._replays)

    def is_warm(self, shape: Shape) -> bool:
        """Whether the next run of a shape costs what all later ones will."""
        if self.record is None or self.why_not is not None:
            return shape in self._asked
        return shape in self._replays

    def run(self, shape: Shape, body: Replay, at_once: bool = False) -> Tensor:
        """What `body` returns: by a replay if the shape has been recorded, or eagerly.

        The result of a replay may be overwritten by the next replay, of any shape.

        Args:
            at_once: whether to record a shape that is new.
        """
        if shape in self._replays:
            replay = self._replays[shape] = self._replays.pop(shape)  # the last one is the latest
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
        """Bytes of the accelerator's memory that torch holds; 0 without one."""
        cuda = self.device is not None and self.device.type == "cuda"
        return torch.cuda.memory_reserved(self.device) if cuda else 0

    def clear(self) -> None:
        """Forgets what was recorded: tensors have moved."""
        self._replays.clear()
        self._asked.clear()
        self.bytes = 0


def _seconds(replay: Replay) -> float:
    """Until its result is there."""
    started = clock.now()
    float(replay().flatten()[0])
    return clock.now() - started


def make_graphs(reader: Reader, mode: Mode) -> Graphs | None:
    """What runs a reader's forwards of fixed shape; None where shapes are exact and forwards eager."""
    record = RECORDERS.get(reader.device.type)
    if mode is False or (record is None and mode != "compile"):
        return None
    way = compiled() if mode == "compile" else forward
    return Graphs(record and record(reader), way, _why_not(reader.model), reader.costs, reader.device)


def _why_not(model: nn.Module) -> str | None:
    """Why a model's forwards cannot be recorded, if that can be seen beforehand."""
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
    """Refuses what cannot be recorded, before a recording has begun: one that fails half way leaves CUDA astray."""

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
"""Operators that read a value to the host, bring one from there, or have a result whose shape depends on values."""
COPIES = {"aten._to_copy.default", "aten.copy_.default"}


def between_devices(args: Any, kwargs: Any) -> bool:
    """Whether a copy's source and target are on different devices."""
    types = {value.device.type for value in args if isinstance(value, Tensor)}
    return len(types | ({torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set())) > 1


def by_mask(name: str, args: Any) -> bool:
    """Whether an operator indexes with true and false, so that a shape depends on values."""
    if not name.startswith(("aten.index.Tensor", "aten.index_put")):
        return False
    one = "put" in name and args[2].numel() == 1  # filled in without counting
    return not one and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def check_on_device(body: Replay) -> None:
    """Runs a body; RuntimeError if it cannot be recorded."""
    # Not compiled: dynamo would skip, for good, a frame that it first meets under a dispatch mode.
    with torch.compiler.set_stance("force_eager"), OnDeviceOnly():
        body()


_RECORDING = threading.Lock()
"""CUDA captures one graph at a time in a process."""


def record_cuda(reader: Reader) -> Record:
    """Records CUDA graphs whose memory is shared: they run one after the other."""
    device = reader.device
    stream = torch.cuda.Stream(device)  # its own: the default one belongs to the device that was first
    alive: WeakSet[Any] = WeakSet()
    pool: Any = None

    def record(body: Replay) -> Replay:
        nonlocal pool
        check_on_device(body)
        if not alive:  # a pool whose graphs are all gone cannot be used again
            pool = torch.cuda.graph_pool_handle()
        # The outer stream is what a recording that fails half way returns to.
        with _RECORDING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads continue meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = body()
        alive.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


RECORDERS: dict[str, Callable[[Reader], Record]] = {"cuda": record_cuda}
"""By the device's type."""
