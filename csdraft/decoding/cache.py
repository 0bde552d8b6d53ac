"""A preallocated KV cache whose slots are written by index (rollback is free); all about transformers' caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

__all__ = [
    "SlotCache",
    "cross_attention_cache",
    "encoder_decoder_cache",
    "export_cache",
    "holds",
    "import_cache",
    "windows_of_cache",
]

Slots = slice | Tensor
"""Where a forward writes: one range for all rows, or (rows, queries) slot indices."""


class SlotLayer(DynamicLayer):
    """Keys and values of one layer: (rows, heads, capacity, head_dim), of which the model sees the first `visible`."""

    is_sliding = False  # windows are applied by the mask, from positions
    is_croppable = False
    is_compileable = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache
        self.key_buffer = self.value_buffer = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.key_buffer, self.value_buffer = (
            # Zeros, since a masked slot still meets a weight of 0, and 0 * nan is nan.
            states.new_zeros(states.shape[0], states.shape[1], self.cache.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.key_buffer.shape[2] < self.cache.capacity:
            self._grow()
        slots, visible = self.cache.slots, self.cache.visible
        if isinstance(slots, slice):  # narrow: half the price of indexing, and this runs in every layer of every step
            queries = slots.stop - slots.start
            self.key_buffer.narrow(2, slots.start, queries).copy_(key_states)
            self.value_buffer.narrow(2, slots.start, queries).copy_(value_states)
        else:
            index = self.cache.index_for(key_states)
            self.key_buffer.scatter_(2, index, key_states)
            index = index if value_states.shape == key_states.shape else self.cache.index_for(value_states)
            self.value_buffer.scatter_(2, index, value_states)
        self.keys, self.values = self.key_buffer.narrow(2, 0, visible), self.value_buffer.narrow(2, 0, visible)
        return self.keys, self.values

    def _grow(self) -> None:
        for name in ("key_buffer", "value_buffer"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], self.cache.capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0


class SlotCache(Cache):
    """KV cache with preallocated slots; `place` says where the next forward writes and how far it sees.

    Args:
        layers: number of self-attention layers.
        capacity: slots to reserve; grows by doubling when a forward needs more.
    """

    def __init__(self, layers: int, capacity: int):
        self.capacity = capacity
        self.slots: Slots = slice(0, 0)
        self.start = self.visible = 0
        self._indices: dict[tuple, Tensor] = {}
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def place(self, slots: Slots, start: int, visible: int) -> None:
        """Before a forward: its queries write `slots`, and the model sees slots 0 to `visible`.

        Args:
            slots: a range shared by all rows, or (rows, queries) indices.
            start: what `get_seq_length` answers (T5 computes its position bias from it).
            visible: number of leading slots the mask covers.
        """
        if visible > self.capacity:
            self.capacity = max(visible, 2 * self.capacity)
        self.slots, self.start, self.visible = slots, start, visible
        self._indices.clear()

    def index_for(self, states: Tensor) -> Tensor:
        """(rows, heads, queries, head_dim) view of the slots, made once a forward and shape."""
        key = (states.device, states.shape)
        if key not in self._indices:
            assert isinstance(self.slots, Tensor)
            self._indices[key] = self.slots.to(states.device)[:, None, :, None].expand(states.shape)
        return self._indices[key]

    def move(self, row: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies slot `sources[i]` of a row to `targets[i]`, all at once."""
        indices: dict[torch.device, Tensor] = {}  # layers may be on several devices: one copy each
        for layer in self._filled():
            for buffer in (layer.key_buffer, layer.value_buffer):
                if buffer.device not in indices:
                    indices[buffer.device] = torch.tensor([sources, targets], device=buffer.device)
                source, target = indices[buffer.device]
                buffer[row].index_copy_(1, target, buffer[row].index_select(1, source))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drops all batch rows but `rows`, in that order."""
        for layer in self._filled():
            index = torch.tensor(rows, device=layer.key_buffer.device)
            layer.key_buffer, layer.value_buffer = layer.key_buffer[index], layer.value_buffer[index]

    def _filled(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]  # type: ignore[misc]

    @property
    def is_written(self) -> bool:
        """Whether a forward has put keys and values into it."""
        return bool(self._filled())

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(b.numel() * b.element_size() for x in self._filled() for b in (x.key_buffer, x.value_buffer))


def encoder_decoder_cache(own: SlotCache, cross: Cache | None) -> EncoderDecoderCache:
    """`own` for self-attention; `cross` (a fresh one if None) for the encoder's keys and values, written once."""
    return EncoderDecoderCache(own, cross if cross is not None else DynamicCache())


def cross_attention_cache(cache: Cache | None) -> Cache | None:
    """The cross-attention half of generate's cache, if it is an encoder-decoder one."""
    return cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None


def holds(cache: Cache) -> bool:
    """Whether `import_cache` and `export_cache` know this kind of cache."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def windows_of_cache(config: Any) -> set[int | None]:
    """How many of the last tokens the layers of plain `generate`'s cache keep; None for all.

    Args:
        config: of the text model. Its fields decide, whether or not the model's own masks heed them.
    """
    return {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers}


def import_cache(cache: Cache, own: SlotCache, kept: Tensor) -> None:
    """Fills `own` with what the user's cache holds.

    Args:
        kept: (rows, length) bool, False where the user's cache holds padding; each row's kept entries become its
            first slots. A sliding layer that has dropped old entries leaves their slots empty: no mask lets them show.
    """
    length = kept.shape[1]
    counts = kept.sum(1).tolist()
    source = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    own.place(slice(0, 0), 0, max(max(counts), 1))
    for old, new in zip(source.layers, own.layers, strict=True):
        if not old.is_initialized or old.keys is None:  # type: ignore[union-attr]
            continue
        new.lazy_initialization(old.keys, old.values)  # type: ignore[arg-type]
        dropped = length - old.keys.shape[2]
        for row, count in enumerate(counts):
            seen = kept[row, dropped:].to(old.keys.device)
            size = int(seen.sum())
            new.key_buffer[row, :, count - size : count] = old.keys[row][:, seen]  # type: ignore[union-attr]
            new.value_buffer[row, :, count - size : count] = old.values[row][:, seen]  # type: ignore[index,union-attr]


def export_cache(own: SlotCache, kept: Tensor, into: Cache) -> None:
    """The inverse of `import_cache`: fills a cache so that plain `generate` can go on from it.

    Args:
        kept: (rows, length) bool, False where the output has padding, zeros in the cache.
        into: the user's cache or the one that `generate` prepared; what it held is replaced.
    """
    target = into
    if isinstance(into, EncoderDecoderCache):
        target, cross = into.self_attention_cache, into.cross_attention_cache
        into.is_updated.update({index: cross.get_seq_length(index) > 0 for index in range(len(cross))})
    target.reset()
    for index, layer in enumerate(own.layers):
        if not layer.is_initialized:
            continue
        halves = []
        for buffer in (layer.key_buffer, layer.value_buffer):  # type: ignore[attr-defined]
            half = buffer.new_zeros(*buffer.shape[:2], kept.shape[1], buffer.shape[3])
            for row, seen in enumerate(kept.to(buffer.device)):
                half[row][:, seen] = buffer[row, :, : int(seen.sum())]
            halves.append(half)
        target.update(*halves, index)
