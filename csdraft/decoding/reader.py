"""A reader: runs one model with its cache. It turns plans into inputs and masks, and returns logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from csdraft.decoding import clock
from csdraft.decoding.cache import NoCache, SlotCache, encoder_decoder_cache
from csdraft.decoding.graphs import FEWEST_SLOTS, Forward, Graphs, Mode, bucket, forward, make_graphs, slots_bucket
from csdraft.decoding.grouped import GroupedHeads, logits_to_read
from csdraft.decoding.inputs import Inputs, Plan, Shape
from csdraft.decoding.ledger import ModelUse
from csdraft.decoding.packed import packed
from csdraft.decoding.states import home, ways_on
from csdraft.decoding.traits import Span, tapped, traits_of

__all__ = ["Reader", "Sources"]

WIDEST = 64
"""Inputs with at most this many queries are kept for the next forward of their shape, and may be of fixed shape."""
LARGE_MASK = 1 << 15
"""Of masks with more entries than this, those that are known are not computed; in smaller ones that takes longer."""
_RAN: WeakKeyDictionary[nn.Module, set[tuple[int, int, int]]] = WeakKeyDictionary()
"""Model -> (rows, queries, depth) of all forwards that it has run eagerly, in any reader."""


@dataclass
class Sources:
    """The encoder's inputs and outputs of an encoder-decoder model, for each row of the batch."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    encoder_outputs: object = None
    cross_cache: object = None


class Reader:
    """Runs one model on batches of plans with its own cache.

    Args:
        model: a causal LM or a T5-like encoder-decoder.
        rows: batch size.
        capacity: slots to reserve for each row.
        taps: the hidden states that it keeps with keys and values, see `Drafter.taps`.

    Attributes:
        ways: how torch computed when its tensors were made, see `ways_on`.
        size, rows: the batch size of its cache, and that of its forwards, which leave out rows that have ended.
        use: the call's counts of its forwards and their seconds.
        shape, warm: the shape of the last forward, and whether the model had run that shape before in the same way.
        runs: what runs the forwards: the model, or on a CPU its twin, see `packed`.
        costs: shape -> seconds of a warm forward, for shapes that were recorded or prepared.
        features: gives a drafting head what it reads beside its tokens, (rows, queries, width); see `FeatureSession`.
    """

    def __init__(self, model: nn.Module, rows: int, capacity: int, taps: frozenset[int] = frozenset()):
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        self.model, self.size, self.rows, self.taps = model, rows, rows, taps
        self.sources: Sources | None = None
        self.device, self.dtype = home(model)
        self.ways = ways_on(self.device)
        self.on_host = self.device.type == "cpu"  # logits can be read without a copy
        self.vocab, self.traits = text.vocab_size, traits_of(model)
        self.encoder_decoder = config.is_encoder_decoder
        layers = text.num_decoder_layers if self.encoder_decoder else text.num_hidden_layers
        by_position = not self.traits.sees_all or self.encoder_decoder
        self.cache = SlotCache(layers, rows, capacity, self.device, by_position)
        self.lacks_tokens, self.use = False, ModelUse()
        self.costs: dict[Shape, float] = {}
        self.features: Callable[[Inputs], Tensor] | None = None
        self.begun_with: tuple[Any, Any] = None, None  # of its model, see `readers`
        self.mode: Mode = False
        self.graphs: Graphs | None = None  # while it is None, shapes are exact and forwards eager
        self.shape, self.warm = Shape(rows, 0, 0), False
        self.last_position = (self.traits.positions or 1 << 30) - 1
        self._ran = _RAN.setdefault(model, set())
        self._buffers: dict[tuple[int, int, int], Inputs] = {}
        self._past = None
        self._prompts = torch.zeros(rows, 2, dtype=torch.long, device=self.device)
        self._steps = torch.arange(capacity, device=self.device)  # (capacity,)

    def begin(
        self, sources: Sources | None, lacks_tokens: bool, graphs: Mode = False, use: ModelUse | None = None
    ) -> None:
        """Starts another call.

        Args:
            sources: the encoder's inputs of an encoder-decoder; they are encoded now if they were not yet.
            lacks_tokens: whether it may get token ids beyond its vocabulary, as other models pad theirs differently.
            graphs: how forwards run, see `Mode`. `use`: the call's counts.
        """
        fixed = graphs if sources is None else False  # recorded forwards cannot use each call's encoder output
        self.rows = self.size
        if fixed != self.mode:
            self.mode, self.graphs = fixed, make_graphs(self, fixed)
            self.reserve(self.cache.capacity)
        on_twin = graphs == "auto" and self.graphs is None
        self.runs = packed(self.model, *self.begun_with) if on_twin else self.model
        if self.graphs is not None and lacks_tokens != self.lacks_tokens:
            self.graphs.clear()  # ids are clamped within the forward
        self.use, self.sources, self.lacks_tokens = use or ModelUse(), sources, lacks_tokens
        if sources is not None and sources.attention_mask is not None:
            sources.attention_mask = sources.attention_mask.to(self.device)
        self._encode()

    def renew(self) -> None:
        """Called before the cache gets new buffers, where slot s holds position s: drops what was recorded."""
        if self.graphs is not None:
            self.graphs.clear()
        if self.cache.positions is not None:
            self.cache.positions.copy_(self._steps.expand_as(self.cache.positions))

    def read(self, plans: Sequence[Plan], keep: int, reach: int = 0, at_once: bool = False) -> Tensor:
        """(rows, keep, vocab) logits of the last `keep` queries of each row; short rows are padded on the left.

        Args:
            plans: one for each batch row, in batch order.
            keep: how many trailing queries need logits.
            reach: a position that this forward must contain; if no token has it, a masked query is added.
            at_once: whether to record a new shape now, not only when it comes a second time.

        Raises:
            NoCache: the model did not write keys and values.
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
        inputs.give(self.features)
        if fixed:
            return self._run_fixed(inputs, at_once)[:, -keep:]
        shared = None if padded else _range_of_all(plans)
        unmasked = not deepest and shared is not None and self._masks_itself(shared, queries)
        return self._run(inputs, keep, inputs.end, shared, unmasked)

    def queries(self, wanted: int) -> int:
        """How many queries a forward has that must read `wanted` tokens in each row."""
        return wanted if self.graphs is None or wanted > WIDEST else bucket(wanted)

    def follow(self, plans: Sequence[Plan], tokens: Any) -> Inputs:
        """The inputs of one more token in every row, after those that `plans` have read."""
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
        """(rows, vocab) logits after one more token in every row; `inputs` come from `follow`, perhaps advanced."""
        inputs.give(self.features)
        if self.graphs is not None:
            return self._run_fixed(inputs)[:, 0]
        if self.rows > 1 or inputs.paths is not None:
            return self._run(inputs, 1, inputs.end)[:, 0]
        slots = slice(inputs.end - 1, inputs.end)
        return self._run(inputs, 1, inputs.end, slots, self._masks_itself(slots, 1))[:, 0]

    def _inputs(self, queries: int, deepest: int) -> Inputs:
        """The buffers of a shape; also sets `warm`."""
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
        """Whether the model's own mask is right for a chain in these slots: an ordinary prefill, or a single token."""
        if self.traits.cache_windows:
            return False
        return slots.start == 0 or (queries == 1 and self.traits.sees_all and not self.traits.additive)

    def _run_fixed(self, inputs: Inputs, at_once: bool = False) -> Tensor:
        """(rows, queries, vocab) logits of a forward of fixed shape, which may be recorded and replayed."""
        rows, queries = inputs.ids.shape
        assert self.graphs is not None
        self.reserve(inputs.end)
        slots = slots_bucket(inputs.end, self.cache.capacity)
        if not self.cache.is_written:  # the first forward creates the buffers
            return self._run(inputs, queries, slots)
        started = clock.now()
        self.shape = Shape(rows, queries, slots, 0 if inputs.paths is None else inputs.paths.shape[2])
        self.warm = self.graphs.is_warm(self.shape)
        self.use.forwards += 1
        body = partial(self._body, inputs, queries, slots, forward=self.graphs.forward)
        logits = self.graphs.run(self.shape, body, at_once)
        self.use.seconds += clock.now() - started
        return logits

    def _run(
        self, inputs: Inputs, keep: int, slots: int, shared: slice | None = None, unmasked: bool = False
    ) -> Tensor:
        started, queries = clock.now(), inputs.ids.shape[1]
        self.shape = Shape(self.rows, queries, slots)
        self.use.forwards += 1
        self.reserve(slots)
        told = inputs.seen_by_all if queries * slots > LARGE_MASK else 0
        logits = self._body(inputs, keep, slots, shared, unmasked, told)
        if self.use.forwards == 1 and not self.cache.is_written:
            raise NoCache(
                f"{type(self.model).__name__} kept no keys and values of what it read, which drafted decoding needs; "
                "if it is in training mode, call model.eval() first, otherwise leave assistant= out"
            )
        self.use.seconds += clock.now() - started
        return logits

    def _body(
        self,
        inputs: Inputs,
        keep: int,
        slots: int,
        shared: slice | None = None,
        unmasked: bool = False,
        told: int = 0,
        forward: Forward = forward,
    ) -> Tensor:
        """(rows, keep, vocab) logits of the last `keep` queries. This forward may be run, recorded or compiled.

        It never reads the values of `inputs` on the host, since they differ when it is replayed.

        Args:
            slots: how many leading slots it sees.
            shared: the range of slots, if all rows write the same range.
            unmasked: whether the model's own mask is right.
            told: a number of leading slots that every query sees; it is on the host, so 0 in recorded forwards.
            forward: the model's forward, perhaps compiled.
        """
        self.cache.place(inputs.slots, inputs.positions, slots, shared)
        arguments = self._arguments(inputs, None if unmasked else self._masks(inputs, slots, told))
        if self.traits.keeps_logits:
            arguments["logits_to_keep"] = logits_to_read(keep, inputs.ids.shape[1], self.device, self.dtype)
        if self.taps:
            arguments["output_hidden_states"] = True
        with GroupedHeads(self.mode == "compile"):
            output = forward(self.runs, arguments)
        if self.taps:
            self.cache.note(tapped(self.model, output.hidden_states, self.taps))
        logits = output.logits
        return logits if logits.shape[1] == keep else logits[:, -keep:]

    def _masks(self, inputs: Inputs, slots: int, told: int) -> Tensor | dict[str | None, Tensor]:
        """The model's attention mask: True and False for sdpa, 0 and -inf for eager; a dict if it takes several.

        Each mask is (rows, 1, queries, slots), over the first `slots` slots; every query sees the first `told`.
        """
        allowed = self._steps[told:slots] < inputs.sees[..., None]  # (rows, queries, slots less told)
        allowed = pad(allowed, (told, 0), value=True) if told else allowed  # (rows, queries, slots)
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
        """(rows, queries, slots) bool: the allowed slots that plain `generate` would still have in its cache.

        It reads the prompt in one forward, before anything is dropped. Each later token sees the last `window` tokens.
        """
        prompts, kept = self._prompts[: self.rows, :, None].unbind(1)  # (rows, 1) each
        first = torch.where(positions < prompts, kept, positions) - window  # (rows, queries)
        near = allowed & (standing[:, None] > first[..., None])  # (rows, queries, slots)
        return near | (~near.any(-1, keepdim=True) & allowed)  # a padding query must see something

    def set_prompts(self, prompts: Sequence[int], kept: Sequence[int]) -> None:
        """Sets the length of each row's prompt, and how many of its tokens a cache of the user held."""
        self._prompts.copy_(torch.tensor([prompts, kept], device="cpu").T)  # in place: recorded forwards read it

    def _additive(self, allowed: Tensor) -> Tensor:
        low = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(~allowed, low)

    def _position_bias(self, positions: Tensor, standing: Any) -> Tensor:
        """(rows, heads, queries, slots) bias(positions) - bias(slots): corrects T5, which uses bias(slots)."""
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
            return given if inputs.features is None else given | {"features": inputs.features}
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
        """Makes room for `slots` slots in each row; drops recorded forwards if that moves the cache."""
        if self.graphs is not None:
            slots = bucket(slots, FEWEST_SLOTS)  # so that it seldom moves again
        if self.cache.reserve(slots):
            self._steps = torch.arange(self.cache.capacity, device=self.device)
            if self.graphs is not None:
                self.graphs.clear()

    def _encode(self) -> None:
        """Runs the encoder once, if the model has one and it has not run yet."""
        sources = self.sources
        if not self.encoder_decoder or sources is None or sources.encoder_outputs is not None:
            return
        encoder = self.runs.get_encoder()  # type: ignore[operator]
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
                for layer in self._past.cross_attention_cache.layers:  # a static one has no method for it
                    layer.keys, layer.values = layer.keys[index], layer.values[index]  # type: ignore[index]
            sources = self.sources
            outputs = sources.encoder_outputs
            outputs = type(outputs)(last_hidden_state=outputs.last_hidden_state[index])  # type: ignore
            mask = None if sources.attention_mask is None else sources.attention_mask[index]
            self.sources = Sources(sources.input_ids, mask, outputs, sources.cross_cache)


def _range_of_all(plans: Sequence[Plan]) -> slice | None:
    """The range of slots, if all rows write the same range; else None."""
    first, count = plans[0].slots[0], len(plans[0].slots)
    wanted = range(first, first + count)
    return slice(first, first + count) if all(list(wanted) == list(plan.slots) for plan in plans) else None


def _spanned(allowed: Tensor, span: Span, positions: Tensor, standing: Any) -> Tensor:
    """(rows, queries, slots) bool: the allowed slots within the span of each query."""
    if span.window is not None and allowed.shape[-1] > span.window:
        return allowed & (standing[:, None] > positions[..., None] - span.window)
    if span.chunk is not None and allowed.shape[-1] > span.chunk:
        return allowed & (standing[:, None] // span.chunk == positions[..., None] // span.chunk)
    return allowed
