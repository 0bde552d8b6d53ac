"""How one forward is executed: from host-side plans to tensors, masks and logits, for every model family."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csdraft.decoding.cache import SlotCache, encoder_decoder_cache
from csdraft.decoding.traits import Span, traits_of

__all__ = ["Feed", "NoCache", "Runner", "Sources", "home"]

SHORT = 64
"""A chain of so many nodes needs no mask of its own to be computed."""


class NoCache(ValueError):
    """A model has kept no keys and values of what it read."""


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
        length: tokens of the row's text.
    """

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    sees: list[int]
    end: int
    extra: list[tuple[int, ...]] | None = None
    elsewhere: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def only(self, queries: Sequence[int]) -> Feed:
        """The same with these queries alone; they are in order."""
        pick = lambda values: [values[query] for query in queries]  # noqa: E731 - five uses on two lines
        extra = None if self.extra is None else pick(self.extra)
        tokens, slots, positions, sees = map(pick, (self.tokens, self.slots, self.positions, self.sees))
        return Feed(tokens, slots, positions, sees, self.end, extra, self.elsewhere, self.length)


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
        self.traits = traits_of(model)
        self.encoder_decoder = config.is_encoder_decoder
        layers = text.num_decoder_layers if self.encoder_decoder else text.num_hidden_layers
        self.cache = SlotCache(layers, capacity)
        self._lower = torch.ones(SHORT, SHORT, dtype=torch.bool, device=self.device).tril_()
        self._single = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._plain = self.traits.sees_all and not self.traits.additive
        self._past = None
        self._prompts = torch.zeros(rows, 2, dtype=torch.long, device=self.device)
        self._steps = torch.arange(capacity, device=self.device)
        self._seen = torch.ones(1, 1, 1, capacity, dtype=torch.bool, device=self.device)
        self.seconds, self.forwards, self.fed = 0.0, 0, 0

    def forward(self, feeds: Sequence[Feed], keep: int, ids: Tensor | None = None, reach: int = 0) -> Tensor:
        """Feeds the rows, right-aligned; (rows, keep, vocab) logits of the last `keep` queries.

        Args:
            feeds: one a batch row, in batch order.
            keep: how many trailing queries need logits.
            ids: (rows, 1) tokens already on the device, instead of the feeds' own.
            reach: a position that the model must see in this forward, as a masked query if no token stands there.

        Raises:
            NoCache: the model kept no keys and values.
        """
        started = time.perf_counter()
        self.forwards += 1
        if len(feeds) == 1 and feeds[0].extra is None and feeds[0].positions[-1] >= reach:
            arguments = self._chain(feeds[0], ids)
        else:
            arguments = self._ragged(feeds, ids, reach)
        if self.traits.keeps_logits:
            arguments["logits_to_keep"] = keep
        logits = self.model(**arguments, use_cache=True, return_dict=True).logits
        if self.forwards == 1 and not self.cache.is_written:
            raise NoCache(
                f"{type(self.model).__name__} kept no keys and values of what it read, which drafted decoding goes on "
                "from; if it is in training mode, call model.eval() first, otherwise leave assistant= out"
            )
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
        if (start == 0 and not self.traits.cache_windows) or (queries == 1 and self._plain):
            return self._arguments(ids, positions, None)  # an ordinary prefill or step: the model masks it itself
        if queries == 1:
            allowed = self._seen.narrow(3, 0, end)[0]
        else:
            allowed = torch.ones(1, queries, end, dtype=torch.bool, device=self.device)
            earlier = self._lower[:queries, :queries] if queries <= SHORT else allowed[0, :, start:].tril()
            allowed[0, :, start:] = earlier
        return self._arguments(ids, positions, self._masks(allowed, positions, self._steps[:end]))

    def _ragged(self, feeds: Sequence[Feed], ids: Tensor | None, reach: int = 0) -> dict:
        """Any rows and trees: per-row slots, a mask from (slot, position) pairs; short rows padded on the left."""
        queries = max(len(feed.tokens) for feed in feeds)
        if reach and max(max(feed.positions) for feed in feeds) < reach:
            queries += 1
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
                    [reach] * pad + feed.positions,
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
        standing, bias = steps.expand(len(feeds), end), None  # (rows, slots) -> position
        if not self.traits.sees_all or self.encoder_decoder:
            odd = [(r, s, p) for r, feed in enumerate(feeds) for s, p in feed.elsewhere]
            odd += [(r, feed.end, reach) for r, feed in enumerate(feeds) if len(feed.tokens) < queries]  # padding
            if odd:
                standing = standing.clone()
                rows, at, values = torch.tensor(odd, device=self.device).unbind(1)
                standing[rows, at] = values
        if self.encoder_decoder:
            bias = self._position_bias(positions, standing)
        return self._arguments(
            tokens if ids is None else ids, positions, self._masks(allowed, positions, standing, bias)
        )

    def _shared_range(self, feeds: Sequence[Feed], queries: int) -> slice | None:
        """The one range that all rows write, if they do."""
        first = feeds[0].slots
        if all(feed.slots == first for feed in feeds) and first == list(range(first[0], first[0] + queries)):
            return slice(first[0], first[0] + queries)
        return None

    def _masks(
        self, allowed: Tensor, positions: Tensor, standing: Tensor, bias: Tensor | None = None
    ) -> Tensor | dict[str | None, Tensor]:
        """What the model's attention takes: True and False for sdpa, 0 and -inf for eager; a dict if it takes several.

        Args:
            allowed: (rows, queries, slots) bool, by order alone.
            positions: (rows, queries) of the queries.
            standing: (rows, slots) or (slots,) positions of the slots.
            bias: (rows, heads, queries, slots) added to the scores.
        """
        made: dict[Span, Tensor] = {}
        for window in self.traits.cache_windows:  # at most one: `refusals`
            assert window is not None
            allowed = self._in_cache(allowed, window, positions, standing)
        for span in self.traits.spans.values():
            if span not in made:
                mask = _spanned(allowed, span, positions, standing)[:, None]  # (rows, 1, queries, slots)
                mask = self._additive(mask) if bias is not None or self.traits.additive else mask
                made[span] = mask if bias is None else mask + bias
        masks = {key: made[span] for key, span in self.traits.spans.items()}
        return masks.get(None, masks)

    def _in_cache(self, allowed: Tensor, window: int, positions: Tensor, standing: Tensor) -> Tensor:
        """(rows, queries, slots) bool: of what is allowed, what plain `generate` still has in its cache.

        The prompt is read in one forward, before anything is dropped; each later token sees the last `window`.
        """
        prompts, kept = self._prompts[..., None].unbind(1)  # (rows, 1) each
        first = torch.where(positions < prompts, kept, positions) - window  # (rows, queries)
        near = allowed & (standing[..., None, :] > first[..., None])
        return near | (~near.any(-1, keepdim=True) & allowed)  # a padding query must see something

    def set_prompts(self, prompts: Sequence[int], kept: Sequence[int]) -> None:
        """Says how long each row's prompt is, and how much of it a cache of the user's held."""
        self._prompts = torch.tensor([prompts, kept], device=self.device).T

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

    def _arguments(self, ids: Tensor, positions: Tensor, mask: Tensor | dict[str | None, Tensor] | None) -> dict:
        if not self.encoder_decoder:
            return {
                "input_ids": ids,
                "position_ids": positions,
                "attention_mask": mask,
                self.traits.cache_name: self.cache,
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
            self.traits.cache_name: self._past,
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
        self._prompts = self._prompts[torch.tensor(rows, device=self.device)]
        if self.encoder_decoder and self.sources is not None:
            index = torch.tensor(rows, device=self.device)
            if self._past is not None:
                self._past.cross_attention_cache.batch_select_indices(index)
            sources = self.sources
            outputs = sources.encoder_outputs
            outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[index])  # type: ignore
            mask = None if sources.attention_mask is None else sources.attention_mask[index]
            self.sources = Sources(sources.input_ids, mask, outputs, sources.cross_cache)


def _spanned(allowed: Tensor, span: Span, positions: Tensor, standing: Tensor) -> Tensor:
    """(rows, queries, slots) bool: of what is allowed, what lies in the span of each query."""
    if span.window is not None and standing.shape[-1] > span.window:
        near = standing[..., None, :] > positions[..., None] - span.window
    elif span.chunk is not None and standing.shape[-1] > span.chunk:
        near = standing[..., None, :] // span.chunk == positions[..., None] // span.chunk
    else:
        return allowed
    return allowed & near


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
