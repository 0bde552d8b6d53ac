"""One model and its cache, reading: from plans to inputs, masks and logits, for every family."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from csdraft.decoding import clock
from csdraft.decoding.cache import SlotCache, encoder_decoder_cache
from csdraft.decoding.graphs import FEWEST_SLOTS, Forward, Graphs, Mode, bucket, forward, make_graphs, slots_bucket
from csdraft.decoding.grouped import grouped_heads
from csdraft.decoding.inputs import Inputs, Plan, Shape
from csdraft.decoding.names import name_of
from csdraft.decoding.traits import Span, traits_of

__all__ = ["NoCache", "Reader", "Sources", "home", "place"]

WIDEST = 64
"""Inputs of so many queries or fewer are kept for the next forward of their shape, and may have a fixed one."""


_RAN: WeakKeyDictionary[nn.Module, set[tuple[int, int, int]]] = WeakKeyDictionary()
"""Rows, queries and depths of the forwards that each model has run eagerly, in whichever reader."""


class NoCache(ValueError):
    """A model has kept no keys and values of what it read."""


@dataclass
class Sources:
    """What an encoder-decoder model reads besides its own text: one row a batch row."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    encoder_outputs: object = None
    cross_cache: object = None


class Reader:
    """Runs one model on batches of plans, over its own cache, and keeps count of what that costs.

    Args:
        model: a causal LM or a T5-like encoder-decoder.
        rows: batch size.
        capacity: slots to reserve a row.
        taps: the hidden states that it keeps beside keys and values, see `Drafter.taps`.

    Attributes:
        inference: whether its tensors were made under `torch.inference_mode`.
        size: batch size of its cache, and `rows`: of its forwards, without those that have ended.
        shape: of the last forward, and `warm`: whether the model had run that shape before, as it runs it now.
        costs: seconds of a warm forward by shape, as far as shapes were recorded or prepared.
        features: of a drafting head, what it reads beside its tokens, (rows, queries, width); see `FeatureSession`.
    """

    def __init__(self, model: nn.Module, rows: int, capacity: int, taps: frozenset[int] = frozenset()):
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        self.model, self.size, self.rows, self.taps = model, rows, rows, taps
        self.sources: Sources | None = None
        self.inference = torch.is_inference_mode_enabled()
        self.device, self.dtype = home(model)
        self.on_host = self.device.type == "cpu"  # what the model computes is at hand without a copy
        self.vocab, self.traits = text.vocab_size, traits_of(model)
        self.encoder_decoder = config.is_encoder_decoder
        layers = text.num_decoder_layers if self.encoder_decoder else text.num_hidden_layers
        by_position = not self.traits.sees_all or self.encoder_decoder
        self.cache = SlotCache(layers, rows, capacity, self.device, by_position)
        self.lacks_tokens = False
        self.seconds, self.forwards, self.fed = 0.0, 0, 0
        self.costs: dict[Shape, float] = {}
        self.features: Callable[[Inputs], Tensor] | None = None
        self.mode: Mode = False
        self.graphs: Graphs | None = None  # while it is None, shapes are exact and forwards eager
        self.shape, self.warm = Shape(rows, 0, 0), False
        self.last_position = (self.traits.positions or 1 << 30) - 1
        self._ran = _RAN.setdefault(model, set())
        self._buffers: dict[tuple[int, int, int], Inputs] = {}
        self._past = None
        self._prompts = torch.zeros(rows, 2, dtype=torch.long, device=self.device)
        self._steps = torch.arange(capacity, device=self.device)

    def begin(self, sources: Sources | None, lacks_tokens: bool, graphs: Mode = False) -> None:
        """Another call: counts from nothing.

        Args:
            sources: the encoder's inputs, for encoder-decoders; they are encoded if they are not yet.
            lacks_tokens: whether it may be given tokens that only the padding rows of other models have.
            graphs: how forwards of fixed shape run, see `graphs`.
        """
        graphs = graphs if sources is None else False  # each call has an encoder's output of its own
        self.rows = self.size
        if graphs != self.mode:
            self.mode, self.graphs = graphs, make_graphs(self, graphs)
            self.reserve(self.cache.capacity)
        if self.graphs is not None and lacks_tokens != self.lacks_tokens:
            self.graphs.clear()  # ids are clamped within the forward
        self.sources, self.lacks_tokens = sources, lacks_tokens
        self.seconds, self.forwards, self.fed = 0.0, 0, 0
        if sources is not None and sources.attention_mask is not None:
            sources.attention_mask = sources.attention_mask.to(self.device)
        self._encode()

    def renew(self) -> None:
        """Other keys and values are about to come, which lie elsewhere, each at the position of its slot."""
        if self.graphs is not None:
            self.graphs.clear()
        if self.cache.positions is not None:
            self.cache.positions.copy_(self._steps.expand_as(self.cache.positions))

    def read(self, plans: Sequence[Plan], keep: int, reach: int = 0, at_once: bool = False) -> Tensor:
        """(rows, keep, vocab) logits of the last `keep` queries of each row; short rows are padded on the left.

        Args:
            plans: one a batch row, in batch order.
            keep: how many trailing queries need logits.
            reach: a position that the model must see in this forward, as a masked query if no token stands there.
            at_once: whether a new shape is recorded now, rather than when it is asked for again.

        Raises:
            NoCache: the model kept no keys and values.
        """
        queries = max(len(plan.tokens) for plan in plans)
        if reach and max(max(plan.positions) for plan in plans) < reach:
            queries += 1
        fixed = self.graphs is not None and not reach and queries <= WIDEST
        queries = self.queries(queries) if fixed else queries
        padded = any(len(plan.tokens) < queries for plan in plans)
        deepest = max(max(plan.deepest for plan in plans), int(padded))
        inputs = self._inputs(queries, bucket(deepest) if fixed else deepest)
        inputs.load(plans, reach)
        if fixed:
            return self._run_fixed(inputs, at_once)[:, -keep:]
        shared = None if padded else _range_of_all(plans)
        unmasked = not deepest and shared is not None and self._masks_itself(shared, queries)
        return self._run(inputs, keep, inputs.end, shared, unmasked)

    def queries(self, wanted: int) -> int:
        """How many queries a forward has that reads so many tokens of text or draft in each row."""
        return wanted if self.graphs is None or wanted > WIDEST else bucket(wanted)

    def follow(self, plans: Sequence[Plan], tokens: Any) -> Inputs:
        """The inputs of one more token in every row, behind those that `plans` have read."""
        nexts = []
        for plan in plans:
            slot, idle = plan.slots[-1] + 1, not plan.sees[-1]
            position, sees = plan.positions[-1] + 1, 0 if idle else slot + 1
            nexts.append(Plan((0,), (position,), (slot,), (sees,), ((slot,),) if idle else None, slot + 1))
        fixed = self.graphs is not None
        inputs = self._inputs(1, 1 if fixed else max(plan.deepest for plan in nexts))
        inputs.load(nexts)
        inputs.put(tokens)
        return inputs

    def step(self, inputs: Inputs) -> Tensor:
        """(rows, vocab) logits after one more token in every row: inputs of `follow`, or moved on since."""
        if self.graphs is not None:
            return self._run_fixed(inputs)[:, 0]
        if self.rows > 1 or inputs.paths is not None:
            return self._run(inputs, 1, inputs.end)[:, 0]
        slots = slice(inputs.end - 1, inputs.end)
        return self._run(inputs, 1, inputs.end, slots, self._masks_itself(slots, 1))[:, 0]

    def _inputs(self, queries: int, deepest: int) -> Inputs:
        """The buffers of a shape."""
        key = (self.rows, queries, deepest)
        self.warm = key in self._ran
        self._ran.add(key)
        if key in self._buffers:
            return self._buffers[key]
        made = Inputs(*key, self.device)
        if queries <= WIDEST:
            self._buffers[key] = made
        return made

    def _masks_itself(self, slots: slice, queries: int) -> bool:
        """Whether the model's own mask is right for a chain in these slots: an ordinary prefill, or one more token."""
        if self.traits.cache_windows:
            return False
        return slots.start == 0 or (queries == 1 and self.traits.sees_all and not self.traits.additive)

    def _run_fixed(self, inputs: Inputs, at_once: bool = False) -> Tensor:
        """(rows, queries, vocab) logits of a forward of fixed shape, which may be recorded and replayed."""
        rows, queries = inputs.ids.shape
        assert self.graphs is not None
        self.reserve(inputs.end)
        slots = slots_bucket(inputs.end, self.cache.capacity)
        if not self.cache.is_written:  # its buffers are made by the first forward
            return self._run(inputs, queries, slots)
        started = clock.now()
        self.shape = Shape(rows, queries, slots, 0 if inputs.paths is None else inputs.paths.shape[2])
        self.warm = self.graphs.is_warm(self.shape)
        self.forwards += 1
        body = partial(self._body, inputs, queries, slots, forward=self.graphs.forward)
        logits = self.graphs.run(self.shape, body, at_once)
        self.seconds += clock.now() - started
        return logits

    def _run(
        self, inputs: Inputs, keep: int, slots: int, shared: slice | None = None, unmasked: bool = False
    ) -> Tensor:
        started = clock.now()
        self.shape = Shape(self.rows, inputs.ids.shape[1], slots)
        self.forwards += 1
        self.reserve(slots)
        logits = self._body(inputs, keep, slots, shared, unmasked)
        if self.forwards == 1 and not self.cache.is_written:
            raise NoCache(
                f"{type(self.model).__name__} kept no keys and values of what it read, which drafted decoding goes on "
                "from; if it is in training mode, call model.eval() first, otherwise leave assistant= out"
            )
        self.seconds += clock.now() - started
        return logits

    def _body(
        self,
        inputs: Inputs,
        keep: int,
        slots: int,
        shared: slice | None = None,
        unmasked: bool = False,
        forward: Forward = forward,
    ) -> Tensor:
        """(rows, keep, vocab) logits of the last `keep` queries: the one forward, run, recorded or compiled.

        Nothing in it looks at the values of `inputs`, which differ when it is replayed.

        Args:
            slots: how many leading slots it sees.
            shared: the range of slots that all rows write, if it is one.
            unmasked: whether the model's own mask is the right one.
            forward: of the model; compiled, it may be.
        """
        self.cache.place(inputs.slots, inputs.positions, slots, shared)
        arguments = self._arguments(inputs, None if unmasked else self._masks(inputs, slots))
        if self.traits.keeps_logits:
            arguments["logits_to_keep"] = keep
        if self.taps:
            arguments["output_hidden_states"] = True
        with grouped_heads():
            output = forward(self.model, arguments)
        if self.taps:
            self.cache.note(self.taps, output.hidden_states)
        return output.logits[:, -keep:]

    def _masks(self, inputs: Inputs, slots: int) -> Tensor | dict[str | None, Tensor]:
        """What the model's attention takes: True and False for sdpa, 0 and -inf for eager; a dict if it takes several.

        Each mask is (rows, 1, queries, slots), over the first `slots` slots.
        """
        allowed = self._steps[:slots] < inputs.sees[..., None]  # (rows, queries, slots)
        if inputs.paths is not None:
            allowed.scatter_(2, inputs.paths, True)
        positions = self.cache.positions
        standing = positions[: self.rows, :slots] if positions is not None else None  # (rows, slots)
        for window in self.traits.cache_windows:  # at most one: `refusals`
            assert window is not None
            allowed = self._in_cache(allowed, window, inputs.positions, standing)
        bias = self._position_bias(inputs.positions, standing) if self.encoder_decoder else None
        made: dict[Span, Tensor] = {}
        for span in self.traits.spans.values():
            if span not in made:
                mask = _spanned(allowed, span, inputs.positions, standing)[:, None]  # (rows, 1, queries, slots)
                mask = self._additive(mask) if bias is not None or self.traits.additive else mask
                made[span] = mask if bias is None else mask + bias
        masks = {key: made[span] for key, span in self.traits.spans.items()}
        return masks.get(None, masks)

    def _in_cache(self, allowed: Tensor, window: int, positions: Tensor, standing: Any) -> Tensor:
        """(rows, queries, slots) bool: of what is allowed, what plain `generate` still has in its cache.

        The prompt is read in one forward, before anything is dropped; each later token sees the last `window`.
        """
        prompts, kept = self._prompts[: self.rows, :, None].unbind(1)  # (rows, 1) each
        first = torch.where(positions < prompts, kept, positions) - window  # (rows, queries)
        near = allowed & (standing[:, None] > first[..., None])
        return near | (~near.any(-1, keepdim=True) & allowed)  # a padding query must see something

    def set_prompts(self, prompts: Sequence[int], kept: Sequence[int]) -> None:
        """Says how long each row's prompt is, and how much of it a cache of the user's held."""
        self._prompts.copy_(torch.tensor([prompts, kept]).T)  # in place: recorded forwards read it

    def _additive(self, allowed: Tensor) -> Tensor:
        low = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(~allowed, low)

    def _position_bias(self, positions: Tensor, standing: Any) -> Tensor:
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

    def _arguments(self, inputs: Inputs, mask: Any) -> dict:
        ids = inputs.ids.clamp(max=self.vocab - 1) if self.lacks_tokens else inputs.ids
        if not self.encoder_decoder:
            given = {"input_ids": ids, "position_ids": inputs.positions, "attention_mask": mask}
            given[self.traits.cache_name] = self.cache
            return given if self.features is None else given | {"features": self.features(inputs)}
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

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots a row; what was recorded is forgotten if that moves the cache."""
        if self.graphs is not None:
            slots = bucket(slots, FEWEST_SLOTS)  # so that the next text need not move it
        if self.cache.reserve(slots):
            self._steps = torch.arange(self.cache.capacity, device=self.device)
            if self.graphs is not None:
                self.graphs.clear()

    def _encode(self) -> None:
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
        """Drops all batch rows but `rows`, until the next call. See `SlotCache.keep_rows`."""
        self.cache.keep_rows(rows)
        self.rows = len(rows)
        index = torch.tensor(rows, device=self.device)
        self._prompts[: self.rows] = self._prompts[index]
        if self.encoder_decoder and self.sources is not None:
            if self._past is not None:
                self._past.cross_attention_cache.batch_select_indices(index)
            sources = self.sources
            outputs = sources.encoder_outputs
            outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[index])  # type: ignore
            mask = None if sources.attention_mask is None else sources.attention_mask[index]
            self.sources = Sources(sources.input_ids, mask, outputs, sources.cross_cache)


def _range_of_all(plans: Sequence[Plan]) -> slice | None:
    """The one range of slots that all rows write, if they do."""
    first, count = plans[0].slots[0], len(plans[0].slots)
    wanted = range(first, first + count)
    return slice(first, first + count) if all(list(wanted) == list(plan.slots) for plan in plans) else None


def _spanned(allowed: Tensor, span: Span, positions: Tensor, standing: Any) -> Tensor:
    """(rows, queries, slots) bool: of what is allowed, what lies in the span of each query."""
    if span.window is not None and allowed.shape[-1] > span.window:
        return allowed & (standing[:, None] > positions[..., None] - span.window)
    if span.chunk is not None and allowed.shape[-1] > span.chunk:
        return allowed & (standing[:, None] // span.chunk == positions[..., None] // span.chunk)
    return allowed


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model takes its token ids, and the dtype it computes in."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate brings the weights there for each forward
        device = torch.device(embeddings._hf_hook.execution_device)
    return device, model.dtype  # type: ignore[return-value]


def place(model: nn.Module) -> str:
    """What costs are measured of and on: the model's name and dtype, the accelerator or the processor's threads."""
    device, dtype = home(model)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} with {torch.get_num_threads()} threads"
    return f"{name_of(model)} in {str(dtype).removeprefix('torch.')} on {name}"
