"""A model reading a batch of texts. Its KV cache keeps itself in step with what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from csdraft.decoding.cache import cross_attention_cache, import_cache
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Request
from csdraft.decoding.rotary import RotaryFactors
from csdraft.decoding.runner import Feed, Runner, Sources
from csdraft.decoding.scores import Head, Scores
from csdraft.decoding.text import Text

__all__ = ["Session"]


@dataclass
class Reading:
    """What the cache holds of one row: the first `read` tokens of its text, then the nodes of a draft."""

    text: Text | None = None
    read: int = 0
    draft: Draft = Draft()
    slots: list[int] = field(default_factory=list)
    long: bool = False  # whether its first token was read with the rotary factors for long texts


class Session:
    """One model reading a batch of texts, in step with whatever text and draft it is asked about.

    The caller states the truth (these texts, these drafts); the session compares it with what its cache holds, moves
    the few slots of an accepted branch, feeds the rest in one forward and returns the rows. Dropping the cache between
    any two calls changes speed only.

    Args:
        model: a causal LM or T5-like model.
        head: how its logits become tokens, unless `score` is told otherwise.
        rows: batch size.
        capacity: slots to reserve a row.
        sources: the encoder's inputs of an encoder-decoder model.
        vocab: width that logits are cut or padded (with -inf) to; the target's.
        texts: one a row; needed by models whose rotary factors depend on the length of the longest.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        rows: int,
        capacity: int,
        sources: Sources | None,
        vocab: int,
        texts: Sequence[Text] = (),
    ):
        self.model, self.head, self.vocab = model, head, vocab
        self.runner = Runner(model, rows, capacity, sources)
        switch = self.runner.traits.switch
        self.factors = RotaryFactors(switch, texts) if switch and texts and not switch.every_token else None
        if texts:
            self.runner.set_prompts([text.prompt_length for text in texts], [0] * rows)
        self._batch = list(range(rows))  # which row each batch index of the cache holds
        self._readings = {row: Reading() for row in range(rows)}
        self.pinned = False  # whether ended rows must stay, since the cache will be handed out
        self.rolled_back = self.imported = 0

    @property
    def kept(self) -> int:
        """Tokens that the cache holds now."""
        return sum(reading.read + len(reading.draft) for reading in self._readings.values())

    def preload(self, cache: object, texts: Sequence[Text], kept: Tensor) -> None:
        """Takes over the user's own cache, which holds all of each text but its last tokens.

        Args:
            kept: (rows, length) bool, which entries of the cache are tokens rather than padding.
        """
        import_cache(cache, self.runner.cache, kept)  # type: ignore[arg-type]
        if self.runner.encoder_decoder and self.runner.sources is not None:
            self.runner.sources.cross_cache = cross_attention_cache(cache)  # type: ignore[arg-type]
        for row, text in enumerate(texts):
            reading = self._readings[row]
            reading.text, reading.read = text, min(int(kept[row].sum()), len(text) - 1)
            self.imported += reading.read
            if self.factors is not None:
                reading.long = self.factors.kept_are_long(row, len(text), kept.shape[1])
        self.runner.set_prompts(
            [text.prompt_length for text in texts], [self._readings[row].read for row in range(len(texts))]
        )

    @property
    def positions(self) -> int:
        """How many positions the model can stand on; a large number if there is no limit.

        Rotary models have none: past their training length they draft worse, which schedules notice.
        """
        return self.runner.traits.positions or 1 << 30

    def room(self, row: int, text: Text) -> int:
        """How many drafted tokens may follow `text`, so that one forward can read both."""
        room = max(self.positions - len(text), 0)
        return room if self.factors is None else min(room, self.factors.room(row, len(text)))

    def unread(self, row: int, text: Text) -> int:
        """Tokens of `text` that the model has not read yet: the price of asking it anything."""
        reading = self._readings[row]
        return len(text) - (reading.read if reading.text is text else 0)

    def forget(self) -> None:
        """Drops everything the cache holds (speed, never output)."""
        for reading in self._readings.values():
            self.rolled_back += reading.read + len(reading.draft)
            reading.text, reading.read, reading.draft, reading.slots = None, 0, Draft(), []

    def settle(self, texts: Sequence[Text], length: int) -> None:
        """Makes the cache ready to be handed out: it then holds each text, or what fits in `length` with its padding.

        Plain `generate` never reads a text's last token; a row that ends before the others has had it read.
        """
        missing = []
        for row, text in enumerate(texts):
            reading = self._readings[row]
            if reading.text is not text:
                self._restart(reading, text)
            below, _ = self._advance(row, reading)
            self.rolled_back += len(below)
            reading.draft, reading.slots = Draft(), []
            if reading.read < min(len(text), length - text.padding):
                missing.append(Request(row, text, Draft(), (ROOT,)))
        if missing:
            self.score(missing)

    def retire(self, live: Sequence[int]) -> None:
        """Repacks the batch once at most half of its rows are still wanted."""
        if self.pinned or 2 * len(live) > len(self._batch):
            return
        places = [self._batch.index(row) for row in live]
        self.runner.keep_rows(places)
        self._batch = list(live)

    def score(self, requests: Sequence[Request], choose: bool = True, head: Head | None = None) -> list[Scores]:
        """The logits after the wanted nodes of each request, from one forward of the whole batch.

        Args:
            choose: whether somebody will ask for the choices along a branch, so that they may be made beforehand.
            head: how logits become tokens; the session's own way if None.
        """
        head = head or self.head
        plans, queries = {}, {}
        for request in requests:
            plans[request.row], queries[request.row] = self.plan(request)
        keep = max(len(plans[row].tokens) - min(at) for row, at in queries.items())
        logits = self.forward(plans, keep)
        wanted = [self._wanted(request) for request in requests]
        views = []
        for request in requests:
            rows, before = logits[self._batch.index(request.row)], len(plans[request.row].tokens) - keep
            at = [query - before for query in queries[request.row]]  # a batch is aligned at the end
            views.append(rows[at[0] : at[-1] + 1] if at == list(range(at[0], at[-1] + 1)) else rows[at])
        chains = all(request.draft.is_chain for request in requests)
        choices = self._choose(views, chains, head) if choose else [None] * len(requests)
        return [
            Scores(head, request.row, request.text, request.draft, after, rows, chosen)
            for request, after, rows, chosen in zip(requests, wanted, views, choices, strict=True)
        ]

    @staticmethod
    def _wanted(request: Request) -> Sequence[int]:
        return range(ROOT, len(request.draft)) if request.after is None else request.after

    def _choose(self, views: Sequence[Tensor], chains: bool, head: Head) -> list[list[int] | None]:
        """All choices of the batch at once, where that is the cheaper way: of a tree most are never asked for."""
        on_host = self.runner.device.type == "cpu"
        if not (head.processing.text_blind and head.sampler.greedy) or (on_host and not chains):
            return [None] * len(views)
        return head.choose_all(views)  # type: ignore[return-value]

    # From here on: comparing what is asked with what is cached.

    def plan(self, request: Request) -> tuple[Feed, list[int]]:
        """What must be fed so that the cache holds the request's text and draft; updates the row's reading.

        Returns: the feed, and which of its queries the wanted nodes are.
        """
        reading, text, draft = self._readings[request.row], request.text, request.draft
        if reading.text is not text:
            self._restart(reading, text)
        length = len(text)
        self._check_factors(request.row, reading, length)
        old, nodes = len(reading.draft), self._wanted(request)
        wanted = set(nodes)
        if old and reading.read == length and draft.goes_on(reading.draft) and min(nodes) >= old:  # a tree that grows
            feed = Feed([], [], [], [], length, length=length)
            self._feed_nodes(reading, draft, range(old, len(draft)), feed)
            return feed, [node - old for node in nodes]
        cached, root = self._advance(request.row, reading)
        feed = Feed([], [], [], [], length, length=length)
        first = min(reading.read, length - 1) if ROOT in wanted else reading.read
        self.rolled_back += reading.read - first
        for position in range(first, length):
            feed.tokens.append(text.tokens[position])
        feed.slots.extend(range(first, length))
        feed.positions.extend(range(first, length))
        feed.sees.extend(range(first + 1, length + 1))
        reading.read = length
        query_of = self._plan_draft(reading, draft, wanted, cached, root, feed)
        query_of[ROOT] = length - first - 1
        return feed, [query_of[node] for node in nodes]

    def _plan_draft(
        self, reading: Reading, draft: Draft, wanted: set[int], cached: dict[int, int], root: int, feed: Feed
    ) -> dict[int, int]:
        """Adds the nodes that are not cached, or are wanted again, below the text; which query each of them is."""
        reused = self._reused(reading.draft, draft, cached, root) if cached else {}
        self.rolled_back += len(cached) - len(reused)
        slots = [cached[twin] for twin in reused.values()]
        free = max([reading.read, *(slot + 1 for slot in slots)])
        reading.draft, reading.slots = draft, []
        if not reused:
            before = len(feed.tokens)
            self._feed_nodes(reading, draft, range(len(draft)), feed)
            return {node: before + node for node in range(len(draft))}
        nodes = []
        for node in range(len(draft)):
            twin = reused.get(node)
            if twin is None:
                slot, free = free, free + 1
            else:
                slot = cached[twin]
            reading.slots.append(slot)
            if twin is None or node in wanted:
                self.rolled_back += twin is not None
                nodes.append(node)
        before = len(feed.tokens)
        self._feed_nodes(reading, draft, nodes, feed)
        return {node: before + i for i, node in enumerate(nodes)}

    @staticmethod
    def _reused(old: Draft, draft: Draft, cached: dict[int, int], root: int) -> dict[int, int]:
        """Node of the new draft -> node of the old one, of those whose keys and values are in the cache."""
        reused: dict[int, int] = {}
        taken = set()  # siblings may carry the same token: only one of them can have its twin's slot
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            above = root if parent == ROOT else reused.get(parent)
            if above is None or (twin := old.child(above, token)) not in cached or twin in taken:
                continue
            reused[node] = twin  # type: ignore[assignment]
            taken.add(twin)
        return reused

    def _feed_nodes(self, reading: Reading, draft: Draft, nodes: Sequence[int], feed: Feed) -> None:
        """Adds `nodes` of the draft; those without a slot, which are the last ones, get the next free slots."""
        length, texts, slots = reading.read, len(feed.tokens), reading.slots
        free = max(slots, default=length - 1) + 1
        slots.extend(range(free, free + len(draft) - len(slots)))
        feed.tokens += [draft.tokens[node] for node in nodes]
        feed.slots += (own := [slots[node] for node in nodes])
        feed.end = max(length, max(slots, default=-1) + 1)
        reading.draft = draft
        if draft.is_chain and slots == list(range(length, length + len(slots))):
            feed.positions += own
            feed.sees += [slot + 1 for slot in own]
            if feed.slots and feed.slots != list(range(feed.slots[0], feed.slots[0] + len(feed.slots))):
                feed.extra = [()] * len(feed.tokens)  # a gap: slots are not one range
            return
        depths = range(len(draft)) if draft.is_chain else draft.depths
        standing = [length + depth for depth in depths]
        feed.positions += [standing[node] for node in nodes]
        feed.sees += [length] * len(nodes)
        feed.elsewhere = list(zip(slots, standing, strict=True))
        seen: dict[int, tuple[int, ...]] = {}
        for node in nodes:
            parent = draft.parents[node]
            if parent not in seen:
                seen[parent] = tuple(slots[above] for above in draft.path(parent))
            seen[node] = (*seen[parent], slots[node])
        feed.extra = [()] * texts + [seen[node] for node in nodes]

    def _check_factors(self, row: int, reading: Reading, length: int) -> None:
        """Forgets a text that the model must read again, since other rotary factors apply to all of it now."""
        if self.factors is None:
            return
        long = self.factors.long(row, 0, length)
        if long != reading.long:
            self.rolled_back += reading.read + len(reading.draft)
            reading.read, reading.draft, reading.slots, reading.long = 0, Draft(), [], long

    def _restart(self, reading: Reading, text: Text) -> None:
        """Another text in this row: keep what both have in common."""
        common = 0
        if reading.text is not None:
            old = reading.text.tokens
            while common < min(reading.read, len(text)) and old[common] == text.tokens[common]:
                common += 1
        self.rolled_back += reading.read - common + len(reading.draft)
        reading.text, reading.read, reading.draft, reading.slots = text, common, Draft(), []

    def _advance(self, row: int, reading: Reading) -> tuple[dict[int, int], int]:
        """Turns cached nodes that have become text into text.

        Returns: the nodes still cached below the text with their slots, and the node that the text now ends on.
        """
        tokens, draft = reading.text.tokens, reading.draft  # type: ignore[union-attr]
        if not len(draft):
            return {}, ROOT
        tip, path = ROOT, []
        while reading.read + len(path) < len(tokens):
            node = draft.child(tip, tokens[reading.read + len(path)])
            if node is None:
                break
            path.append(node)
            tip = node
        moves = [(reading.slots[node], reading.read + i) for i, node in enumerate(path)]
        moves = [(source, target) for source, target in moves if source != target]
        if moves:
            self.runner.cache.move(self._batch.index(row), *zip(*moves, strict=True))
        reading.read += len(path)
        if reading.read < len(tokens):  # the text left the draft: nothing below it holds
            self.rolled_back += len(draft) - len(path)
            reading.draft, reading.slots = Draft(), []
            return {}, ROOT
        kept = set(path)
        below: dict[int, int] = {}
        for node, parent in enumerate(draft.parents):
            if node not in kept and (parent == tip or parent in below):
                below[node] = reading.slots[node]
        self.rolled_back += len(draft) - len(path) - len(below)
        return below, tip

    def forward(self, plans: dict[int, Feed], keep: int, ids: Tensor | None = None) -> Tensor:
        """(rows, keep, vocab) logits of the last `keep` queries of each row.

        One forward; two where rotary factors change between the queries, those for short texts first.

        Args:
            plans: what each row feeds, by row; of the others nothing is read.
            keep: how many trailing queries need logits.
            ids: (rows, 1) tokens already on the device, instead of the plans' own.
        """
        if self.factors is None:
            return self._forward(plans, keep, ids)
        short, long = (self.factors.part(plans, long) for long in (False, True))
        reach = self.factors.switch.length
        if ids is not None or not (short and long):  # as nearly always
            return self._forward(plans, keep, ids, reach if long else 0)
        parts = [(short, self._forward(short, keep)), (long, self._forward(long, keep, None, reach))]
        logits = parts[0][1].new_zeros(len(self._batch), keep, self.vocab)
        for row in plans:
            own = [found[self.place(row), -len(part[row].tokens) :] for part, found in parts if row in part]
            joined = torch.cat(own)[-keep:]
            logits[self.place(row), -len(joined) :] = joined
        return logits

    def _forward(self, plans: dict[int, Feed], keep: int, ids: Tensor | None = None, reach: int = 0) -> Tensor:
        feeds = []
        for row in self._batch:
            plan = plans.get(row)
            if plan is None:  # a row nobody asked about: one masked token in a slot of no use
                reading = self._readings[row]
                free = max([reading.read, *(slot + 1 for slot in reading.slots)])
                feeds.append(Feed([0], [free], [0], [0], free + 1, [(free,)], [(free, 0)]))
            else:
                self.runner.fed += len(plan.tokens)
                if self.runner.vocab < self.vocab:  # padding rows that only the target's vocabulary has
                    plan.tokens = [min(token, self.runner.vocab - 1) for token in plan.tokens]
                feeds.append(plan)
        logits = self.runner.forward(feeds, keep, ids, reach)
        if logits.shape[-1] > self.vocab:
            logits = logits[..., : self.vocab]
        elif logits.shape[-1] < self.vocab:
            logits = torch.nn.functional.pad(logits, (0, self.vocab - logits.shape[-1]), value=float("-inf"))
        return logits

    def place(self, row: int) -> int:
        """Where a row stands in the batch."""
        return self._batch.index(row)

    def append(self, row: int, token: int) -> Feed:
        """Feeds one token below everything the row's cache holds: a step of autoregressive drafting.

        The session learns what the tokens were by `appended`, once they are all drawn.
        """
        reading = self._readings[row]
        slots = reading.slots
        slot, position = slots[-1] + 1 if slots else reading.read, reading.read + len(slots)
        slots.append(slot)
        if slot == position:
            return Feed([token], [slot], [position], [slot + 1], slot + 1, length=reading.read)
        standing = [(s, reading.read + i) for i, s in enumerate(slots)]  # behind a gap
        return Feed([token], [slot], [position], [reading.read], slot + 1, [tuple(slots)], standing, reading.read)

    def appended(self, row: int, tokens: Sequence[int]) -> None:
        """Says which tokens the last appended ones were."""
        reading = self._readings[row]
        reading.draft = reading.draft.extend(tokens, 0)
