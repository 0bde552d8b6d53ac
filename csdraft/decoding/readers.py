"""Readers outlive calls: the next call of a model goes on from the text that its cache still holds.

A reader is lent to one call at a time, so that two threads have two; it is taken back when the call ends, and kept
as long as its model lives, within MOST of all. What it holds is only trusted if the model is as it was: its parameters
have not been written to, and the last token that is kept, read once more, leaves the same keys and values. What it has
recorded is only replayed while the parameters lie where they did and the modules are set as they were.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from csdraft.decoding.graphs import Mode
from csdraft.decoding.reader import Reader

__all__ = ["ALONE", "ReadingOptions", "borrow", "held", "release", "take_back"]

MOST = 8
"""Readers that wait for their next call, of all models together; the one that has waited longest goes first."""


@dataclass(frozen=True)
class ReadingOptions:
    """How a model reads in one call.

    Attributes:
        reuse: whether it goes on from what it has read of these texts in earlier calls, and keeps what it reads now.
        graphs: how forwards of fixed shape run.
        taps: the hidden states that it keeps, see `Drafter.taps`.
    """

    reuse: bool = False
    graphs: Mode = False
    taps: frozenset[int] = frozenset()


ALONE = ReadingOptions()
"""Of a call that takes nothing over and leaves nothing."""


@dataclass(eq=False)
class Waiting:
    """A reader between two calls.

    Attributes:
        model: whose it is; not kept alive.
        reader: without its model.
        texts: (rows,) the tokens that its cache holds of each row.
        state: of the model's parameters, when the call ended.
        setting: of its modules, if something has been recorded.
    """

    model: weakref.ref[nn.Module]
    reader: Reader
    texts: list[list[int]]
    state: tuple
    setting: tuple | None

    def suits(self, rows: int, taps: frozenset[int]) -> bool:
        """Whether it can serve a call of so many rows here: what inference mode has made is of no use outside."""
        reader = self.reader
        return (reader.size, reader.taps, reader.inference) == (rows, taps, torch.is_inference_mode_enabled())


_LOCK = threading.RLock()  # a model may go while this thread holds it
_waiting: list[Waiting] = []


def borrow(
    model: nn.Module,
    rows: int,
    capacity: int,
    texts: Sequence[Sequence[int]],
    taps: frozenset[int] = frozenset(),
) -> tuple[Reader, list[int]]:
    """A reader for one call, and how many leading tokens of each row's text it holds.

    Args:
        rows: batch size.
        capacity: slots to reserve a row.
        texts: (rows,) the tokens of each row; all of them empty for a reader that holds nothing, which may have
            recorded something; none for a new one.
        taps: the hidden states that it must keep.
    """
    with _LOCK:
        own = [w for w in _waiting if w.model() is model and w.suits(rows, taps)] if texts else []
        own = own if any(texts) else [w for w in own if not any(w.texts)]
        best = max(own, key=lambda w: sum(map(_common, w.texts, texts)), default=None)
        if best is not None:
            _waiting.remove(best)
    if best is None:
        return Reader(model, rows, capacity, taps), [0] * rows
    reader, state = best.reader, state_of(model)
    reader.model = model
    reader.reserve(capacity)
    if reader.graphs is not None and (_places(state) != _places(best.state) or setting_of(model) != best.setting):
        reader.graphs.clear()
    same = best.state == state
    return reader, [_common(*pair) if same else 0 for pair in zip(best.texts, texts, strict=True)]


def take_back(reader: Reader, texts: Sequence[Sequence[int]]) -> None:
    """The end of a call: keeps the reader for the next one.

    Args:
        texts: (rows,) what its cache holds of each row.
    """
    model = reader.model
    state = state_of(model)
    if state is None or reader.encoder_decoder or len(texts) != reader.size or not reader.traits.reusable:
        return
    setting = None if reader.graphs is None else setting_of(model)
    waiting = Waiting(weakref.ref(model, _forget), reader, [list(text) for text in texts], state, setting)
    reader.model = None  # type: ignore[assignment]
    with _LOCK:
        _waiting.append(waiting)
        del _waiting[:-MOST]


def release(model: nn.Module | None = None) -> int:
    """Frees the caches that are kept between calls, of one model or of all; how many bytes that were."""
    with _LOCK:
        gone = [w for w in _waiting if model is None or w.model() in (model, None)]
        _waiting[:] = [w for w in _waiting if w not in gone]
    return sum(w.reader.cache.bytes for w in gone)


def held(model: nn.Module | None = None) -> int:
    """Bytes that are kept between calls, of one model or of all."""
    with _LOCK:
        return sum(w.reader.cache.bytes for w in _waiting if model is None or w.model() is model)


def state_of(model: nn.Module) -> tuple | None:
    """What changes when the model's parameters do: where they are, and how often they were written to.

    None of a model that must not be trusted: in training mode, or with parameters that do not count.
    """
    if model.training:
        return None
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def setting_of(model: nn.Module) -> tuple:
    """What decides which operators a forward runs, besides its inputs: numbers, names and hooks of the modules."""
    return tuple(
        (name, type(module).__name__, *(_plain(value) for value in vars(module).values()))
        for name, module in model.named_modules()
    )


def _plain(value: Any) -> Any:
    """A setting that can be compared with a later one; of objects of other kinds only which they are."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return tuple((key, _plain(own)) for key, own in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_plain, value))
    return id(value)


def _places(state: tuple | None) -> list[int]:
    """Where a model's parameters are."""
    return [place for place, _ in state or ()]


def _forget(model: weakref.ref[nn.Module]) -> None:
    """A model is gone, and its readers go too."""
    with _LOCK:
        _waiting[:] = [w for w in _waiting if w.model is not model]


def _common(held: Sequence[int], text: Sequence[int]) -> int:
    """Leading tokens that both have; one less than the text has, since a model must be asked about its last."""
    most = max(min(len(held), len(text) - 1), 0)
    if held[:most] == text[:most]:
        return most
    return next((i for i in range(most) if held[i] != text[i]), most)
