"""Readers outlive calls: the next call of a model continues from the text that its cache still holds.

A reader is lent to one call at a time, so that two threads have two; it is taken back when the call ends, and kept
as long as its model lives, within MOST of all. What it holds is only trusted if the model is as it was: its parameters
have not been written to, its modules are set as they were, and the last token that is kept, read once more, leaves the
same keys and values. What it has recorded is only replayed while the parameters lie where they did.
"""

from __future__ import annotations

import math
import os
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

MOST, OF_ONE = 8, 4
"""Readers that wait for their next call, of all models together and of one; who has waited longest goes first."""
SHARE = 0.125
"""Of a device's memory: what waiting readers may hold of it, however few they are."""
RECORDED = 256
"""Tokens that are rather read again than that a reader with recordings is passed over."""


@dataclass(frozen=True)
class ReadingOptions:
    """How a model reads in one call.

    Attributes:
        reuse: whether it continues from what it has read of these texts in earlier calls, and keeps what it reads now.
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
        setting: of its modules, at the same time.
    """

    model: weakref.ref[nn.Module]
    reader: Reader
    texts: list[list[int]]
    state: tuple
    setting: tuple

    @property
    def recorded(self) -> bool:
        graphs = self.reader.graphs
        return graphs is not None and bool(graphs.shapes)

    def worth(self, texts: Sequence[Sequence[int]]) -> int:
        """Of texts to read, the tokens that it spares; a little more if it has recorded something."""
        return sum(map(_common, self.texts, texts)) + RECORDED * self.recorded

    def may_be_taken(self, texts: Sequence[Sequence[int]]) -> bool:
        """Whether a call of these texts continues from most of what it holds, or needs its recordings."""
        return self.recorded or 2 * sum(map(_common, self.texts, texts)) >= sum(map(len, self.texts))

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
    if not texts:
        return Reader(model, rows, capacity, taps), [0] * rows
    state, setting = state_of(model), setting_of(model)
    with _LOCK:
        of_model = [w for w in _waiting if w.model() is model]
        for moved in [w for w in of_model if _places(w.state) != _places(state)]:
            _waiting.remove(moved)  # what it holds and has recorded is of tensors that are gone
        own = [w for w in of_model if w in _waiting and w.setting == setting and w.suits(rows, taps)]
        own = own if any(texts) else [w for w in own if not any(w.texts)]
        best = max(own, key=lambda w: w.worth(texts), default=None)
        if best is not None and len(of_model) < OF_ONE and not best.may_be_taken(texts):
            best = None  # another chat continues there
        if best is not None:
            _waiting.remove(best)
    if best is None:
        return Reader(model, rows, capacity, taps), [0] * rows
    best.reader.model = model
    best.reader.reserve(capacity)
    return best.reader, [_common(*pair) if best.state == state else 0 for pair in zip(best.texts, texts, strict=True)]


def take_back(reader: Reader, texts: Sequence[Sequence[int]]) -> None:
    """The end of a call: keeps the reader for the next one.

    Args:
        texts: (rows,) what its cache holds of each row.
    """
    model = reader.model
    state = state_of(model)
    if state is None or reader.encoder_decoder or len(texts) != reader.size or not reader.traits.reusable:
        return
    held = [list(text) for text in texts]
    waiting = Waiting(weakref.ref(model, _forget), reader, held, state, setting_of(model))
    reader.model = None  # type: ignore[assignment]
    with _LOCK:
        _waiting.append(waiting)
        del _waiting[:-MOST]
        _make_room(reader.device)


def _make_room(device: torch.device) -> None:
    """Drops who has waited longest until the others hold no more than their share; the latest stays in any case."""
    there = [w for w in _waiting if w.reader.device == device]
    while len(there) > 1 and sum(w.reader.cache.bytes for w in there) > SHARE * memory_of(device):
        _waiting.remove(there.pop(0))


def memory_of(device: torch.device) -> float:
    """Bytes that a device has; infinity where it cannot be asked."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    if device.type == "cpu" and os.name == "posix":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf


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
    config: Any = model.config
    found: list[Any] = [_plain(vars(part)) for part in (config, config.get_text_config(decoder=True))]
    for module in model.modules():
        own = vars(module)
        found.append(id(module))
        found += [tuple(own[hooks]) for hooks in HOOKS if own[hooks]]
        found += [value if type(value) in PLAIN else _plain(value) for key, value in own.items() if key not in OF_ALL]
    return tuple(found)


PLAIN = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_ALL = frozenset(vars(nn.Module()))
"""What every module has: parameters and buffers, modules, hooks."""


def _plain(value: Any) -> Any:
    """A setting that can be compared with a later one; of objects of other kinds only which they are."""
    if type(value) in PLAIN:
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
