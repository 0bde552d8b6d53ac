"""How one forward is executed: from host-side plans to tensors, masks and logits, for every model family."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csdraft.decoding.cache import SlotCache, encoder_decoder_cache
from csdraft.decoding.cache_names import GENERATE_CACHE, cache_name

__all__ = ["Feed", "Runner", "Sources", "home", "refusal"]

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
ENCODER_DECODERS = {"t5", "mt5"}
SHORT = 64
"""A chain of so many nodes needs no mask of its own to be computed."""


@dataclass
class Sources:
    """What an encoder-decoder model reads besides its own text: one row a batch row."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    encoder_outputs: object = None
    cross_cache: object = None


@dataclass
class Feed:
    """One row's part of a forward. Slots are dense: slot s of a row holds the token at position s, drafts follow.

    Attributes:
        tokens, slots, positions: (queries,) what is fed, where it is written, where it stands.
        sees: (queries,) number of leading slots a query sees.
        end: one past the last slot in use, fed or cached.
        extra: per query, further slots it sees (its ancestors in a tree, itself); None if `sees` says all.
        elsewhere: (slot, position) pairs of cached nodes whose slot is not their position.
    """

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    sees: list[int]
    end: int
    extra: list[tuple[int, ...]] | None = None
    elsewhere: list[tuple[int, int]] = field(default_factory=list)


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be decoded with drafts; None if it can."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - ATTENTION_KINDS
    if getattr(model, "_is_stateful", False) or kinds:
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "recurrent state"
        return (
            f"{name} has {what}, whose state cannot be rolled back when a draft is rejected; "
            "csdraft decodes attention-only models (call generate without assistant=)"
        )
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        return f"{name} is an encoder-decoder outside {sorted(ENCODER_DECODERS)}; its positions cannot be set per row"
    if not config.is_encoder_decoder and "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids, which ragged rows and trees need (ALiBi models such as Bloom do not)"
    if getattr(text, "alibi", False):
        return f"{name} uses ALiBi, which is computed from slots instead of positions; use a rotary checkpoint"
    if "mrope_section" in str(getattr(text, "rope_parameters", "")):
        return f"{name} uses multi-dimensional rotary positions (M-RoPE), which are not supported yet"
    implementation = text._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return (
            f"{name} runs attention by {implementation!r}, which takes no 4D mask; "
            "call model.set_attn_implementation('sdpa') first"
        )
    return None


class Runner:
    """Runs one model on a batch of feeds and keeps count of what that costs.

    Args:
        model: a causal LM or a T5-like encoder-decoder.
        rows: batch size.
        capacity: slots to reserve a row.
        sources: the encoder's inputs, for encoder-decoders.
    """

    def __init__(self, model: nn.Module, rows: int, capacity: int, sources: Sources | None):
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        self.model, self.rows, self.sources = model, rows, sources
        self.device, self.dtype = home(model)
        if sources is not None and sources.attention_mask is not None:
            sources.attention_mask = sources.attention_mask.to(self.device)
        self.vocab = text.vocab_size
        self.eager = text._attn_implementation == "eager"
        self.window = getattr(text, "sliding_window", None)
        kinds = set(getattr(text, "layer_types", None) or ())
        self.kinds = kinds if "sliding_attention" in kinds else set()
        if kinds and not self.kinds:
            self.window = None
        self.encoder_decoder = config.is_encoder_decoder
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache_name = cache_name(model.forward) or GENERATE_CACHE
        layers = text.num_decoder_layers if self.encoder_decoder else text.num_hidden_layers
        self.cache = SlotCache(layers, capacity)
        self._lower = torch.ones(SHORT, SHORT, dtype=torch.bool, device=self.device).tril_()
        self._single = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._plain = self.window is None and not self.eager and not self.kinds  # all layers see alike
        self._past = None
        self._steps = torch.arange(capacity, device=self.device)
        self._seen = torch.ones(1, 1, 1, capacity, dtype=torch.bool, device=self.device)
        self.seconds, self.forwards, self.fed = 0.0, 0, 0

    def forward(self, feeds: Sequence[Feed], keep: int, ids: Tensor | None = None) -> Tensor:
        """Feeds the rows, right-aligned; (rows, keep, vocab) logits of the last `keep` queries.

        Args:
            feeds: one a batch row, in batch order.
            keep: how many trailing queries need logits.
            ids: (rows, 1) tokens already on the device, instead of the feeds' own.
        """
        started = time.perf_counter()
        self.forwards += 1
        if len(feeds) == 1 and feeds[0].extra is None:
            arguments = self._chain(feeds[0], ids)
        else:
            arguments = self._ragged(feeds, ids)
        if self.keeps_logits:
            arguments["logits_to_keep"] = keep
        logits = self.model(**arguments, use_cache=True, return_dict=True).logits
        if logits.shape[1] > keep:
            logits = logits[:, -keep:]
        self.seconds += time.perf_counter() - started
        return logits

    def _chain(self, feed: Feed, ids: Tensor | None) -> dict:
        """One row, a chain in slots that follow one another: slices only."""
        start, queries = feed.slots[0], len(feed.tokens)
        end = start + queries
        self._reserve(end)
        self.cache.place(slice(start, end), start, end)
        positions = self._steps[start:end].unsqueeze(0)
        if ids is None:  # one token needs no new tensor: every step of a drafter comes by here
            one = queries == 1
            ids = self._single.fill_(feed.tokens[0]) if one else torch.tensor([feed.tokens], device=self.device)
        if start == 0 or (queries == 1 and self._plain):
            return self._arguments(ids, positions, None)  # an ordinary prefill or step: the model masks it itself
        if queries == 1:
            allowed = self._seen.narrow(3, 0, end)
        else:
            allowed = torch.ones(queries, end, dtype=torch.bool, device=self.device)
            allowed[:, start:] = self._lower[:queries, :queries] if queries <= SHORT else allowed[:, start:].tril()
        windowed = None
        if self.window is not None and end > self.window:
            windowed = allowed & (self._steps[:end] > positions[..., None] - self.window)
            windowed = windowed.view(1, 1, queries, end)
        allowed = allowed.view(1, 1, queries, end)
        return self._arguments(ids, positions, self._mask(allowed, allowed if windowed is None else windowed))

    def _ragged(self, feeds: Sequence[Feed], ids: Tensor | None) -> dict:
        """Any rows and trees: per-row slots, a mask from (slot, position) pairs; short rows padded on the left."""
        queries = max(len(feed.tokens) for feed in feeds)
        padded = any(len(feed.tokens) < queries for feed in feeds)
        end = max(feed.end for feed in feeds) + padded
        self._reserve(end)
        table = []  # per row: tokens, slots, positions, sees
        for feed in feeds:
            pad = queries - len(feed.tokens)
            table.append(
                (
                    [0] * pad + feed.tokens,
                    [feed.end] * pad + feed.slots,
                    [0] * pad + feed.positions,
                    [0] * pad + feed.sees,
                )
            )
        packed = torch.from_numpy(np.array(table)).to(self.device)  # (rows, 4, queries)
        tokens, slots, positions, sees = packed.unbind(1)
        steps = self._steps[:end]
        common = 0 if padded else min(min(feed.sees) for feed in feeds)  # what all see is not worth comparing
        allowed = torch.ones(len(feeds), queries, end, dtype=torch.bool, device=self.device)
        allowed[..., common:] = steps[common:] < sees[..., None]
        extra = _extra(feeds, queries, end)
        if len(extra):
            allowed.view(-1).index_fill_(0, torch.from_numpy(extra).to(self.device), True)
        shared = self._shared_range(feeds, queries)
        self.cache.place(shared if shared is not None else slots, min(f.slots[0] for f in feeds), end)
        windowed, bias = allowed, None
        if self.window is not None or self.encoder_decoder:
            standing = steps.expand(len(feeds), end).clone()  # (rows, slots) -> position
            odd = [(r, s, p) for r, feed in enumerate(feeds) for s, p in feed.elsewhere]
            if odd:
                rows, at, values = torch.tensor(odd, device=self.device).unbind(1)
                standing[rows, at] = values
            if self.window is not None:
                windowed = allowed & (standing[:, None, :] > positions[..., None] - self.window)
                windowed |= ~windowed.any(-1, keepdim=True) & allowed  # a padding query must see something
            if self.encoder_decoder:
                bias = self._position_bias(positions, standing)
        mask = self._mask(allowed[:, None], windowed[:, None], bias)
        return self._arguments(tokens if ids is None else ids, positions, mask)

    def _shared_range(self, feeds: Sequence[Feed], queries: int) -> slice | None:
        """The one range that all rows write, if they do."""
        first = feeds[0].slots
        if all(feed.slots == first for feed in feeds) and first == list(range(first[0], first[0] + queries)):
            return slice(first[0], first[0] + queries)
        return None

    def _mask(self, allowed: Tensor, windowed: Tensor, bias: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(rows, 1, queries, slots) bool -> what the model's attention takes: bool for sdpa, additive for eager."""
        if bias is not None or self.eager:
            allowed, same = self._additive(allowed), windowed is allowed
            windowed = allowed if same else self._additive(windowed)
            if bias is not None:
                return allowed + bias
        if self.kinds:
            return {"full_attention": allowed, "sliding_attention": windowed}
        return windowed if self.window is not None else allowed

    def _additive(self, allowed: Tensor) -> Tensor:
        low = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(~allowed, low)

    def _position_bias(self, positions: Tensor, standing: Tensor) -> Tensor:
        """(rows, heads, queries, slots) bias(positions) - bias(slots), for T5, which computes its bias from slots."""
        attention = self.model.get_decoder().block[0].layer[0].SelfAttention  # type: ignore[operator,union-attr]
        buckets = attention._relative_position_bucket(  # type: ignore[union-attr,operator]
            standing[:, None, :] - positions[..., None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,  # type: ignore[union-attr]
            max_distance=attention.relative_attention_max_distance,  # type: ignore[union-attr]
        )
        wanted = attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)  # type: ignore[union-attr,operator]
        given = attention.compute_bias(  # type: ignore[union-attr,operator]
            positions.shape[1], standing.shape[1], device=self.device, past_seen_tokens=self.cache.start
        )
        return (wanted - given).to(self.dtype)

    def _arguments(self, ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor] | None) -> dict:
        if not self.encoder_decoder:
            return {
                "input_ids": ids,
                "position_ids": positions,
                "attention_mask": mask,
                self._cache_name: self.cache,
            }
        sources = self.sources
        assert sources is not None
        if self._past is None:
            self._past = encoder_decoder_cache(self.cache, sources.cross_cache)  # type: ignore[arg-type]
        return {
            "encoder_outputs": sources.encoder_outputs,
            "attention_mask": sources.attention_mask,
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            self._cache_name: self._past,
        }

    def _reserve(self, end: int) -> None:
        if end > len(self._steps):
            self._steps = torch.arange(2 * end, device=self.device)
            self._seen = torch.ones(1, 1, 1, 2 * end, dtype=torch.bool, device=self.device)

    def encode(self) -> None:
        """Runs the encoder once, if the model has one and nobody has run it yet."""
        sources = self.sources
        if not self.encoder_decoder or sources is None or sources.encoder_outputs is not None:
            return
        encoder = self.model.get_encoder()  # type: ignore[operator]
        sources.encoder_outputs = encoder(
            input_ids=sources.input_ids.to(self.device),  # type: ignore[union-attr]
            attention_mask=sources.attention_mask,
            return_dict=True,
        )

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drops all batch rows but `rows`."""
        self.cache.keep_rows(rows)
        self.rows = len(rows)
        if self.encoder_decoder and self.sources is not None:
            index = torch.tensor(rows, device=self.device)
            if self._past is not None:
                self._past.cross_attention_cache.batch_select_indices(index)
            sources = self.sources
            outputs = sources.encoder_outputs
            outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[index])  # type: ignore
            mask = None if sources.attention_mask is None else sources.attention_mask[index]
            self.sources = Sources(sources.input_ids, mask, outputs, sources.cross_cache)


def _extra(feeds: Sequence[Feed], queries: int, end: int) -> np.ndarray:
    """What queries see beyond their leading slots, as places in a flat (rows, queries, end); padding sees itself."""
    seen: list[int] = []
    counts: list[int] = []
    for feed in feeds:
        pad = queries - len(feed.tokens)
        ours = [(feed.end,)] * pad + list(feed.extra or [()] * len(feed.tokens))
        seen += chain.from_iterable(ours)
        counts += map(len, ours)
    return np.repeat(np.arange(0, len(counts) * end, end), counts) + np.array(seen, dtype=np.int64)


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model takes its token ids, and the dtype it computes in."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate brings the weights there for each forward
        device = torch.device(embeddings._hf_hook.execution_device)
    return device, model.dtype  # type: ignore[return-value]
