"""Readers outlive calls: the next call of a model goes on from the text that its cache still holds.

A reader is lent to one call at a time, so that two threads have two; it is taken back when the call ends, and kept
as long as its model lives, within MOST of all. What it holds is only trusted if the model is as it was: its parameters
have not been written to, and the last token that is kept, read once more, leaves the same keys and values.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """

    model: weakref.ref[nn.Module]
    reader: Reader
    texts: list[list[int]]
    state: tuple
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.reader.rows


_LOCK = threading.Lock()
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
        texts: (rows,) the tokens of each row; empty for a reader that holds nothing.
        taps: the hidden states that it must keep.
    """
    with _LOCK:
        _drop_dead()
        own = [w for w in _waiting if w.model() is model and w.rows == rows and w.reader.taps == taps] if texts else []
        best = max(own, key=lambda w: sum(map(_common, w.texts, texts)), default=None)
        if best is not None:
            _waiting.remove(best)
    if best is None:
        return Reader(model, rows, capacity, taps), [0] * rows
    best.reader.model = model
    best.reader.reserve(capacity)
    same = best.state == state_of(model)
    return best.reader, [_common(*pair) if same else 0 for pair in zip(best.texts, texts, strict=True)]


def take_back(reader: Reader, texts: Sequence[Sequence[int]]) -> None:
    """The end of a call: keeps the reader for the next one.

    Args:
        texts: (rows,) what its cache holds of each row.
    """
    model = reader.model
    state = state_of(model)
    if state is None or reader.encoder_decoder or len(texts) != reader.rows or not reader.traits.reusable:
        return
    waiting = Waiting(weakref.ref(model), reader, [list(text) for text in texts], state)
    reader.model = None  # type: ignore[assignment]
    with _LOCK:
        _drop_dead()
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


def _drop_dead() -> None:
    """Forgets the readers of models that are gone."""
    _waiting[:] = [w for w in _waiting if w.model() is not None]


def _common(held: Sequence[int], text: Sequence[int]) -> int:
    """Leading tokens that both have; one less than the text has, since a model must be asked about its last."""
    most = min(len(held), len(text) - 1)
    if held[:most] == text[:most]:
        return most
    return next(i for i in range(most) if held[i] != text[i])
