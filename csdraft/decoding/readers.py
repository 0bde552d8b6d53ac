"""Keeps readers between calls: a model's next call continues from the text that is still in the cache.

A reader is lent to one call at a time, so two threads get two readers. It is taken back when the call ends, and kept
as long as its model lives; at most MOST are kept. Its cache is only used if the model is unchanged: nothing was
written to its parameters, its modules have the same settings, its embeddings are the same for these texts, and the
last kept token, read again, gives the same keys and values. Its recorded forwards are only replayed while the
parameters are at the same addresses.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csdraft.decoding.graphs import Mode
from csdraft.decoding.packed import release_packed
from csdraft.decoding.reader import Reader
from csdraft.decoding.states import looked_up, memory_of, setting_of, state_of, ways_on

__all__ = ["ALONE", "ReadingOptions", "borrow", "held", "release", "take_back"]

MOST, OF_ONE = 8, 4
"""The most readers that wait for a next call, for all models and for one model; the oldest is dropped first."""
SHARE = 0.125
"""The share of a device's memory that all waiting readers together may hold."""
RECORDED = 256
"""Recorded forwards are worth this many tokens that another reader would not need to read again."""


@dataclass(frozen=True)
class ReadingOptions:
    """How a model reads in one call.

    Attributes:
        reuse: whether it continues from what it read of these texts in earlier calls, and keeps what it reads now.
        graphs: how forwards run, see `csdraft.decoding.graphs.Mode`.
        taps: the hidden states that it keeps, see `Drafter.taps`.
    """

    reuse: bool = False
    graphs: Mode = False
    taps: frozenset[int] = frozenset()


ALONE = ReadingOptions()
"""The options of a call that uses nothing from earlier calls and keeps nothing for later ones."""


@dataclass(eq=False)
class Waiting:
    """A reader between two calls.

    Attributes:
        model: its model, as a weak reference.
        reader: the reader, without its model.
        texts: (rows,) the tokens of each row that its cache holds.
        state: the state of the model's parameters when the call began (`state_of`); what changes meanwhile is noticed.
        setting: the settings of the model's modules at that time (`setting_of`).
        embedded: what the texts read in its embeddings (`looked_up`). Writes through `.data` count no version, and the
            last token does not show those to the rows of other tokens.
    """

    model: weakref.ref[nn.Module]
    reader: Reader
    texts: list[list[int]]
    state: tuple
    setting: tuple
    embedded: list[Tensor]

    @property
    def recorded(self) -> bool:
        graphs = self.reader.graphs
        return graphs is not None and bool(graphs.shapes)

    def worth(self, texts: Sequence[Sequence[int]]) -> int:
        """How many tokens of `texts` need not be read again; `RECORDED` more if it has recorded forwards."""
        return sum(map(_common, self.texts, texts)) + RECORDED * self.recorded

    def may_be_taken(self, texts: Sequence[Sequence[int]]) -> bool:
        """Whether a call with these texts would use at least half of its cache, or its recorded forwards."""
        return self.recorded or 2 * sum(map(_common, self.texts, texts)) >= sum(map(len, self.texts))

    def suits(self, rows: int, taps: frozenset[int]) -> bool:
        """Whether it fits a call with these rows and taps, and the ways in which torch computes now."""
        reader = self.reader
        return (reader.size, reader.taps, reader.ways) == (rows, taps, ways_on(reader.device))


_LOCK = threading.RLock()  # reentrant: a model may be freed, which calls `_forget`, while this thread holds it
_waiting: list[Waiting] = []


def borrow(
    model: nn.Module, rows: int, capacity: int, texts: Sequence[Sequence[int]], taps: frozenset[int] = frozenset()
) -> tuple[Reader, list[int]]:
    """A reader for one call, and (rows,) how many leading tokens of each row's text its cache holds.

    Args:
        rows: batch size.
        capacity: slots to reserve for each row.
        texts: (rows,) the tokens of each row. If all are empty, only readers with an empty cache are used, for their
            recorded forwards. If `texts` is empty, the reader is new.
        taps: the hidden states that it must keep.
    """
    if not texts:
        return Reader(model, rows, capacity, taps), [0] * rows
    state, setting = state_of(model), setting_of(model)
    with _LOCK:
        of_model = [w for w in _waiting if w.model() is model]
        for moved in [w for w in of_model if _places(w.state) != _places(state)]:
            _waiting.remove(moved)  # its cache and recorded forwards belong to parameters that are gone
        own = [w for w in of_model if w in _waiting and w.setting == setting and w.suits(rows, taps)]
        own = own if any(texts) else [w for w in own if not any(w.texts)]
        best = max(own, key=lambda w: w.worth(texts), default=None)
        if best is not None and len(of_model) < OF_ONE and not best.may_be_taken(texts):
            best = None  # leave it to the text that it holds
        if best is not None:
            _waiting.remove(best)
    if best is None:
        reader = Reader(model, rows, capacity, taps)
        reader.begun_with = state, setting
        return reader, [0] * rows
    reader = best.reader
    reader.model, reader.begun_with = model, (state, setting)
    reader.reserve(capacity)
    if best.state != state or not all(map(torch.equal, best.embedded, looked_up(model, best.texts))):
        return reader, [0] * rows
    return reader, [_common(*pair) for pair in zip(best.texts, texts, strict=True)]


def take_back(reader: Reader, texts: Sequence[Sequence[int]]) -> None:
    """Called when a call ends: keeps its reader for the next call.

    Args:
        texts: (rows,) the tokens of each row that its cache holds.
    """
    model, (state, setting) = reader.model, reader.begun_with
    if state is None or reader.encoder_decoder or len(texts) != reader.size or not reader.traits.reusable:
        return
    held = [list(text) for text in texts]
    waiting = Waiting(weakref.ref(model, _forget), reader, held, state, setting, looked_up(model, held))
    reader.model = reader.runs = None  # type: ignore[assignment]
    with _LOCK:
        _waiting.append(waiting)
        del _waiting[:-MOST]
        there = [w for w in _waiting if w.reader.device == reader.device]
        while len(there) > 1 and sum(w.reader.cache.bytes for w in there) > SHARE * memory_of(reader.device):
            _waiting.remove(there.pop(0))  # the oldest; the newest is always kept


def release(model: nn.Module | None = None) -> int:
    """Frees the caches and packed weights that are kept between calls, of one model or of all; returns their bytes."""
    with _LOCK:
        gone = [w for w in _waiting if model is None or w.model() in (model, None)]
        _waiting[:] = [w for w in _waiting if w not in gone]
    return sum(w.reader.cache.bytes for w in gone) + release_packed(model)


def held(model: nn.Module | None = None) -> int:
    """Bytes of the caches that are kept between calls, of one model or of all."""
    with _LOCK:
        return sum(w.reader.cache.bytes for w in _waiting if model is None or w.model() is model)


def _places(state: tuple | None) -> list[int]:
    """The addresses of a model's parameters."""
    return [place for place, *_ in state or ()]


def _forget(model: weakref.ref[nn.Module]) -> None:
    """Called when a model is freed: drops its readers."""
    with _LOCK:
        _waiting[:] = [w for w in _waiting if w.model is not model]


def _common(held: Sequence[int], text: Sequence[int]) -> int:
    """How many leading tokens are equal; less than the whole text, since the model must read its last token."""
    most = max(min(len(held), len(text) - 1), 0)
    if held[:most] == text[:most]:
        return most
    return next((i for i in range(most) if held[i] != text[i]), most)
