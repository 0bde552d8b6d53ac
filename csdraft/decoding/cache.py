"""A preallocated KV cache with slots written by index, so rollback is free; and all code for transformers' caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

__all__ = ["NoCache", "SlotCache", "cross_attention_cache", "encoder_decoder_cache", "export_cache", "holds"]
__all__ += ["import_cache", "slots_of", "windows_of_cache"]


class NoCache(ValueError):
    """A model has kept no keys and values of what it read."""


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
            # Zeros: attention multiplies a masked slot by 0, and 0 * nan would be nan.
            states.new_zeros(states.shape[0], states.shape[1], self.cache.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shared, visible, rows = self.cache.shared, self.cache.visible, key_states.shape[0]
        keys, values = self.key_buffer, self.value_buffer
        if rows < keys.shape[0]:  # some rows have ended
            keys, values = keys[:rows], values[:rows]
        if shared is not None:  # narrow takes half the time of indexing, and this runs in every layer of every step
            queries = shared.stop - shared.start
            keys.narrow(2, shared.start, queries).copy_(key_states)
            values.narrow(2, shared.start, queries).copy_(value_states)
        else:
            # Not scatter_: in bfloat16 on a CPU (PyTorch 2.13) it copies the whole buffer.
            index = self.cache.index_on(key_states.device)
            keys.transpose(1, 2).index_put_(index, key_states.transpose(1, 2))  # (rows, queries, heads, head_dim)
            values.transpose(1, 2).index_put_(index, value_states.transpose(1, 2))
        self.keys, self.values = keys.narrow(2, 0, visible), values.narrow(2, 0, visible)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0


class SlotCache(Cache):
    """KV cache with preallocated slots. Before a forward, `place` sets where it writes and how far it sees.

    Args:
        layers: number of self-attention layers.
        rows: batch size.
        capacity: slots to reserve; grows by doubling when a forward needs more.
        device: where slot numbers and positions are; keys and values stay on the devices where they are computed.
        by_position: whether masks need the position of the token in each slot.

    Attributes:
        positions: (rows, capacity) int64 position of the token in each slot; None if not needed.
        features: tap -> (rows, capacity, hidden) hidden states of the tokens in the slots; see `Drafter.taps`. They
            are written, moved and dropped together with keys and values.
    """

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device, by_position: bool):
        self.capacity = capacity
        self.slots = torch.empty(0)
        self.shared: slice | None = slice(0, 0)
        self.start = self.visible = 0
        self.positions: Tensor | None = None
        if by_position:
            self.positions = torch.arange(capacity, device=device).repeat(rows, 1)
        self.features: dict[int, Tensor] = {}
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def place(self, slots: Tensor, positions: Tensor, visible: int, shared: slice | None = None) -> None:
        """Called before a forward: its queries are written to `slots`, and the model sees the first `visible` slots.

        Args:
            slots, positions: (rows, queries) slot and position of each query.
            visible: number of leading slots that the mask covers.
            shared: the range of slots, if all rows write the same range.
        """
        self.slots, self.shared, self.visible = slots, shared, visible
        self.start = visible - slots.shape[1] if shared is None else shared.start
        self._indices.clear()
        if self.positions is not None:
            self.positions.scatter_(1, slots, positions)  # (rows, capacity)

    def note(self, states: Mapping[int, Tensor]) -> None:
        """Stores the features of the tokens that a forward has just read: by tap, (rows, queries, hidden)."""
        for tap, state in states.items():
            if tap not in self.features:
                self.features[tap] = state.new_zeros(state.shape[0], self.capacity, state.shape[-1])
            self.features[tap].index_put_(self.index_on(state.device), state)  # (rows, queries, hidden)

    def reserve(self, slots: int) -> bool:
        """Makes room for `slots` slots; True if it had to, which moves keys and values to other addresses."""
        if slots <= self.capacity:
            return False
        self.capacity = max(slots, 2 * self.capacity)
        if self.positions is not None:
            more = torch.arange(self.capacity, device=self.positions.device).repeat(len(self.positions), 1)
            more[:, : self.positions.shape[1]] = self.positions
            self.positions = more
        for layer in self._filled():
            layer.key_buffer, layer.value_buffer = self._longer(layer.key_buffer), self._longer(layer.value_buffer)
        self.features = {tap: self._longer(buffer) for tap, buffer in self.features.items()}
        return True

    def _longer(self, old: Tensor) -> Tensor:
        """(..., capacity, width) a buffer's contents, with the cache's new capacity."""
        new = old.new_zeros(*old.shape[:-2], self.capacity, old.shape[-1])
        new[..., : old.shape[-2], :] = old
        return new

    def index_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, queries) row and slot of each query, made once for each forward and device."""
        if device not in self._indices:
            rows = torch.arange(self.slots.shape[0], device=device)[:, None].expand(self.slots.shape)
            # Contiguous as the slots are: CUDA copies all indices in every layer if their strides differ.
            self._indices[device] = rows.contiguous(), self.slots.to(device)
        return self._indices[device]

    def move(self, row: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies slot `sources[i]` of a row to `targets[i]`, all at once."""
        indices: dict[torch.device, Tensor] = {}  # (2, moves): sources, targets; one copy for each device of layers
        if self.positions is not None:
            self.positions[row, list(targets)] = self.positions[row, list(sources)]
        parts = [buffer[row] for buffer in self._buffers()]  # (heads, capacity, head_dim)
        parts += [buffer[row][None] for buffer in self.features.values()]
        for part in parts:
            if part.device not in indices:
                indices[part.device] = torch.tensor([sources, targets], device=part.device)
            source, target = indices[part.device]
            part.index_copy_(1, target, part.index_select(1, source))

    def at(self, row: int, slot: int) -> list[Tensor]:
        """Copies of one token's keys and values: (buffers, heads, head_dim) of each device, dtype and size of layers.

        One copy for all layers: a GPU takes as long for each small one.
        """
        alike: dict[tuple, list[Tensor]] = {}
        for buffer in self._buffers():
            part = buffer[row, :, slot]  # (heads, head_dim)
            alike.setdefault((part.device, part.dtype, part.shape), []).append(part)
        return [torch.stack(parts) for parts in alike.values()]

    def moved(self, row: int, slot: int, before: Sequence[Tensor]) -> list[Tensor]:
        """(2, buffers) each: how far the entries of `at` have moved since `before`, and how large they were then."""
        pairs = zip(before, self.at(row, slot), strict=True)  # (buffers, heads, head_dim)
        return [torch.stack([new - old, old]).flatten(2).norm(dim=-1) for old, new in pairs]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drops all batch rows but `rows`, which become the first rows in this order. The memory is not moved.

        Args:
            rows: `rows[i]` is i, or an index of len(rows) or more.
        """
        buffers = [*self._buffers(), *self.features.values()]
        if self.positions is not None:
            buffers.append(self.positions)
        for target, source in enumerate(rows):
            for buffer in buffers if source != target else ():
                buffer[target] = buffer[source]

    def _filled(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]  # type: ignore[misc]

    def _buffers(self) -> list[Tensor]:
        """(rows, heads, capacity, head_dim) each: the keys and values of every layer."""
        return [buffer for layer in self._filled() for buffer in (layer.key_buffer, layer.value_buffer)]

    @property
    def is_written(self) -> bool:
        """Whether a forward has written keys and values or, for a head without attention, its output."""
        return bool(self._filled() or (self.features and not self.layers))

    @property
    def bytes(self) -> int:
        """Bytes of memory that keys, values and features take."""
        return sum(b.numel() * b.element_size() for b in [*self._buffers(), *self.features.values()])


def encoder_decoder_cache(own: SlotCache, cross: Cache | None) -> EncoderDecoderCache:
    """A cache with `own` for self-attention, and `cross` (None: a new one) for the encoder's keys and values."""
    return EncoderDecoderCache(own, cross if cross is not None else DynamicCache())


def cross_attention_cache(cache: Cache | None) -> Cache | None:
    """The cross-attention half of generate's cache, if it is an encoder-decoder one."""
    return cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None


def holds(cache: Cache) -> bool:
    """Whether `import_cache` and `export_cache` can handle this kind of cache."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return all(type(layer) in KNOWN for layer in cache.layers)


KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def slots_of(cache: Cache, window: int | None) -> int | None:
    """How many tokens a static cache can hold; None if it grows, or if all its layers keep a whole sliding window.

    Args:
        window: the window of the model's sliding layers.
    """
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    bounded = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    sizes = [x.max_cache_len for x in bounded if not (x.is_sliding and window and x.max_cache_len >= window)]
    return min(sizes, default=None)


def _entries(layer: Any) -> tuple[Tensor, Tensor]:
    """(rows, heads, length, head_dim) each: the keys and values in a layer of a user's cache."""
    if not isinstance(layer, StaticLayer):
        return layer.keys, layer.values
    keys, values, seen = layer.keys, layer.values, int(layer.get_seq_length())  # with a window: tokens seen so far
    assert keys is not None
    assert values is not None
    return keys[:, :, :seen], values[:, :, :seen]


def windows_of_cache(config: Any) -> set[int | None]:
    """How many of the last tokens the layers of plain `generate`'s cache keep; None: all.

    Args:
        config: the text model's config. Its fields decide, even if the model's own masks ignore them.
    """
    return {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers}


def import_cache(cache: Cache, own: SlotCache, kept: Tensor) -> None:
    """Fills `own` with the contents of the user's cache.

    Args:
        kept: (rows, length) bool, False where the user's cache holds padding. Each row's other entries go to its first
            slots. If a sliding layer has dropped old entries, their slots stay empty: every mask hides them.
    """
    length = kept.shape[1]
    counts = kept.sum(1).tolist()
    source = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    own.reserve(max(max(counts), 1))
    for old, new in zip(source.layers, own.layers, strict=True):
        if not old.is_initialized or old.keys is None:  # type: ignore[union-attr]
            continue
        keys, values = _entries(old)
        new.lazy_initialization(keys, values)
        dropped = length - keys.shape[2]
        for row, count in enumerate(counts):
            seen = kept[row, dropped:].to(keys.device)  # (entries,) bool
            size = int(seen.sum())
            new.key_buffer[row, :, count - size : count] = keys[row][:, seen]  # type: ignore[union-attr]
            new.value_buffer[row, :, count - size : count] = values[row][:, seen]  # type: ignore[union-attr]


def export_cache(own: SlotCache, kept: Tensor, into: Cache) -> None:
    """The inverse of `import_cache`: fills a cache so that plain `generate` can continue from it.

    Args:
        kept: (rows, length) bool, False where the prompt has padding; the cache gets zeros there.
        into: the user's cache, or the one that `generate` prepared; its contents are replaced.
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
