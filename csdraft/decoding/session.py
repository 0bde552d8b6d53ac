"""A model reading a batch of texts. Its KV cache keeps itself in step with what it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.cache import cross_attention_cache, import_cache
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.graphs import bucket
from csdraft.decoding.inputs import Inputs, Plan
from csdraft.decoding.interfaces import Context, Request
from csdraft.decoding.plans import again_in, plan_of
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ALONE, ReadingOptions, borrow, take_back
from csdraft.decoding.rotary import RotaryFactors
from csdraft.decoding.scores import Head, Scores
from csdraft.decoding.text import Text

__all__ = ["Session"]


@dataclass
class Reading:
    """What the cache holds of one row: the first `read` tokens of its text, then the nodes of a draft, in their order.

    Slot s holds the token at position s of the text; node n of the draft is in slot `read` + n.
    """

    text: Text | None = None
    read: int = 0
    draft: Draft = Draft()
    long: bool = False  # whether its first token was read with the rotary factors for long texts

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.read + len(self.draft)


class Session:
    """One model reading a batch of texts, in step with whatever text and draft it is asked about.

    The caller states the truth (these texts, these drafts); the session compares it with what its cache holds, moves
    the few slots of an accepted branch, reads the rest in one forward and returns the rows. Dropping the cache between
    any two calls changes speed only.

    Args:
        model: a causal LM or T5-like model.
        head: how its logits become tokens, unless `score` is told otherwise.
        rows: batch size.
        capacity: slots to reserve a row.
        sources: the encoder's inputs of an encoder-decoder model.
        vocab: width that logits are cut or padded (with -inf) to; the target's.
        texts: one a row; needed by models whose rotary factors depend on the length of the longest.
        reading: how it reads.
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
        reading: ReadingOptions = ALONE,
    ):
        self.model, self.head, self.vocab = model, head, vocab
        self._reuse = reading.reuse and sources is None
        known = [text.tokens if self._reuse else () for text in texts] if self._reuse or reading.graphs else ()
        self.reader, held = borrow(model, rows, capacity, known, reading.taps)
        self.reader.begin(sources, self.reader.vocab < vocab, reading.graphs)
        switch = self.reader.traits.switch
        self.factors = RotaryFactors(switch, texts) if switch and texts and not switch.every_token else None
        if texts:
            self.reader.set_prompts([text.prompt_length for text in texts], [0] * rows)
        self._batch = list(range(rows))  # which row each batch index of the cache holds
        self._readings = {row: Reading() for row in range(rows)}
        self._unproven: dict[int, tuple[int, list[Tensor]]] = {}  # by row: the last token held, its keys and values
        self.pinned = False  # whether ended rows must stay, since the cache will be handed out
        self.rolled_back = self.imported = 0
        for row, count in enumerate(held):
            if count:
                self._take_over(row, texts[row], count)

    def _take_over(self, row: int, text: Text, count: int) -> None:
        """Trusts that the cache holds the first `count` tokens, on probation: the last of them is read again."""
        self._readings[row] = Reading(text, count - 1)
        self._unproven[row] = count - 1, self.reader.cache.at(row, count - 1)
        self.imported += count
        self.rolled_back += 1

    def close(self) -> None:
        """The end of a call that went well: the model's next call goes on from what its cache holds."""
        readings = list(self._readings.values())
        if self._batch == list(self._readings) and all(reading.text for reading in readings) and self._reuse:
            take_back(self.reader, [reading.text.tokens[: reading.read] for reading in readings])  # type: ignore
        elif self.reader.graphs is not None:
            take_back(self.reader, [()] * len(readings))  # for what it has recorded

    @property
    def kept(self) -> int:
        """Tokens that the cache holds now."""
        return sum(reading.used for reading in self._readings.values())

    @property
    def positions(self) -> int:
        """How many positions the model can stand on; a large number if there is no limit.

        Rotary models have none: past their training length they draft worse, which schedules notice.
        """
        return self.reader.last_position + 1

    def left(self, context: Context) -> int:
        """How many tokens it can draft at a place."""
        return self.positions - len(context.text) - len(context.path)

    def place(self, row: int) -> int:
        """Where a row stands in the batch."""
        return self._batch.index(row)

    def room(self, row: int, text: Text) -> int:
        """How many drafted tokens may follow `text`, so that one forward can read both."""
        room = max(self.positions - len(text), 0)
        return room if self.factors is None else min(room, self.factors.room(row, len(text)))

    def unread(self, row: int, text: Text) -> int:
        """Tokens of `text` that the model has not read yet: the price of asking it anything."""
        reading = self._readings[row]
        return len(text) - (reading.read if reading.text is text else 0)

    # The cache as a whole.

    def preload(self, cache: object, texts: Sequence[Text], kept: Tensor) -> None:
        """Takes over the user's own cache, which holds all of each text but its last tokens.

        Args:
            kept: (rows, length) bool, which entries of the cache are tokens rather than padding.
        """
        self.reader.renew()
        import_cache(cache, self.reader.cache, kept)  # type: ignore[arg-type]
        if self.reader.encoder_decoder and self.reader.sources is not None:
            self.reader.sources.cross_cache = cross_attention_cache(cache)  # type: ignore[arg-type]
        for row, text in enumerate(texts):
            reading = self._readings[row]
            reading.text, reading.read = text, min(int(kept[row].sum()), len(text) - 1)
            self.imported += reading.read
            if self.factors is not None:
                reading.long = self.factors.kept_are_long(row, len(text), kept.shape[1])
        read = [self._readings[row].read for row in range(len(texts))]
        self.reader.set_prompts([text.prompt_length for text in texts], read)

    def forget(self) -> None:
        """Drops everything the cache holds (speed, never output)."""
        self._unproven.clear()
        for reading in self._readings.values():
            self.rolled_back += reading.used
            reading.text, reading.read, reading.draft = None, 0, Draft()

    def settle(self, texts: Sequence[Text], length: int) -> None:
        """Makes the cache ready to be handed out: it then holds each text, or what fits in `length` with its padding.

        Plain `generate` never reads a text's last token; a row that ends before the others has had it read.
        """
        missing = []
        for row, text in enumerate(texts):
            reading = self._readings[row]
            if reading.text is not text:
                self._restart(reading, text)
            self._keep(row, reading, Draft())
            if reading.read < min(len(text), length - text.padding):
                missing.append(Request(row, text, Draft(), (ROOT,)))
        if missing:
            self.score(missing, choose=False)

    def retire(self, live: Sequence[int]) -> None:
        """Repacks the batch without the rows that have ended; where shapes are recorded, at powers of two only."""
        if self.pinned or (self.reader.graphs is not None and bucket(len(live)) >= len(self._batch)):
            return
        self._unproven.clear()
        places, count = {self.place(row) for row in live}, len(live)
        behind = sorted(place for place in places if place >= count)
        order = [place if place in places else behind.pop() for place in range(count)]  # holes are filled from behind
        self.reader.keep_rows(order)
        self._batch = [self._batch[place] for place in order]

    # Questions.

    def score(self, requests: Sequence[Request], choose: bool = True, head: Head | None = None) -> list[Scores]:
        """The logits after the wanted nodes of each request, from one forward of the whole batch.

        Args:
            choose: whether the choices along a branch will be asked for, so that they may be made beforehand.
            head: how logits become tokens; the session's own way if None.
        """
        head = head or self.head
        plans, queries, logits = self.ask(requests)
        views = []
        for request in requests:
            rows, before = logits[self.place(request.row)], len(plans[request.row].tokens) - logits.shape[1]
            at = [query - before for query in queries[request.row]]  # a batch is aligned at the end
            views.append(rows[at[0] : at[-1] + 1] if at == list(range(at[0], at[-1] + 1)) else rows[at])
        choices = self._choose(requests, views, head) if choose else [None] * len(requests)
        return [
            Scores(head, request.row, request.text, request.draft, _wanted(request), rows, chosen)
            for request, rows, chosen in zip(requests, views, choices, strict=True)
        ]

    def ask(self, requests: Sequence[Request]) -> tuple[dict[int, Plan], dict[int, list[int]], Tensor]:
        """Reads what is missing, in one forward of the whole batch.

        Returns: by row, what was read and which of its queries the wanted nodes are; and the (batch, queries, vocab)
            logits of the last queries, of as many as are wanted of any row.
        """
        plans, queries = {}, {}
        for request in requests:
            plans[request.row], queries[request.row] = self.plan(request)
        keep = max(len(plans[row].tokens) - min(at) for row, at in queries.items())
        logits = self.read(plans, keep)
        if self._unproven and not self._prove(plans):  # the model is another one than it was
            self.forget()
            return self.ask(requests)
        return plans, queries, logits

    def _prove(self, rows: Iterable[int]) -> bool:
        """Whether the tokens that were read again have left the same keys and values."""
        for row in rows:
            slot, before = self._unproven.pop(row, (0, []))
            close = 2 * torch.finfo(self.reader.dtype).eps ** 0.75
            for old, new in zip(before, self.reader.cache.at(self.place(row), slot) if before else [], strict=True):
                if float((new - old).norm()) > close * float(old.norm()):
                    return False
        return True

    def _choose(self, requests: Sequence[Request], views: Sequence[Tensor], head: Head) -> Sequence[list[int] | None]:
        """All choices of the batch at once, where that is the cheaper way.

        On the host it is not of a tree, of which most are never asked for, nor where each needs noise of its own.
        """
        chosen = head.sampler.greedy or head.sampler.coupled
        lazily = self.reader.on_host and not (head.sampler.greedy and all(r.draft.is_chain for r in requests))
        if lazily or not chosen or not head.processing.text_blind:
            return [None] * len(views)
        places = [[(r.row, len(r.text) + r.draft.depth(node)) for node in _wanted(r)] for r in requests]
        drafted = [request.draft.tokens for request in requests]
        along = {tokens.choices: None for tokens in drafted if isinstance(tokens, Awaited) and tokens.waiting}
        return head.choose_all(views, places, list(along))

    def features(self, row: int, text: Text, stop: int) -> dict[int, Tensor]:
        """By tap, (stop, hidden) the model's hidden states of the first `stop` tokens of a row's text.

        They are in the cache, but for the last token or two of a text that has just grown; what is missing is read.
        """
        reading = self._readings[row]
        if reading.text is not text:
            self._restart(reading, text)
        self._keep(row, reading, Draft())
        if reading.read < stop or row in self._unproven:
            self.score([Request(row, text, Draft(), (ROOT,))], choose=False)
        place = self.place(row)
        return {tap: buffer[place, :stop] for tap, buffer in self.reader.cache.features.items()}

    def follow(self, plans: dict[int, Plan], tokens: Tensor | Sequence[int]) -> Inputs:
        """The inputs of a step of a chain: (batch,) tokens behind what `plans` have read. See `Reader.follow`."""
        return self.reader.follow(self._of_batch(plans), tokens)

    def step(self, inputs: Inputs) -> Tensor:
        """(batch, vocab) logits after one more token in every row. See `Reader.step`."""
        return self._cut(self.reader.step(inputs))

    def drafted(self, row: int, tokens: Sequence[int], surplus: int) -> None:
        """Says which tokens a row was fed step by step, and how many more that are of no use."""
        reading = self._readings[row]
        reading.draft = reading.draft.extend(tokens, 0)
        self.reader.fed += len(tokens) + surplus
        self.rolled_back += surplus

    # Comparing what is asked with what is cached.

    def plan(self, request: Request) -> tuple[Plan, list[int]]:
        """What must be read so that the cache holds the request's text and draft; updates the row's reading.

        Returns: the plan, and which of its queries the wanted nodes are.
        """
        row, text, draft = request.row, request.text, request.draft
        reading, length, wanted = self._readings[row], len(request.text), _wanted(request)
        if reading.text is not text:
            self._restart(reading, text)
        self._check_factors(row, reading, length)
        grows = reading.read == length and draft.goes_on(reading.draft)
        cached = range(len(reading.draft)) if grows else self._keep(row, reading, draft)
        first = min(reading.read, length - 1) if ROOT in wanted else reading.read
        again = set(wanted).intersection(cached)
        self.rolled_back += reading.read - first + len(again)
        nodes = [node for node in range(len(draft)) if node not in cached or node in again]
        reading.read, reading.draft = length, draft
        at = {node: length - first + i for i, node in enumerate(nodes)} | {ROOT: length - first - 1}
        return plan_of(text, draft, first, nodes), [at[node] for node in wanted]

    def _keep(self, row: int, reading: Reading, draft: Draft) -> set[int]:
        """Turns cached nodes that have become text into text, and finds those that `draft` has again.

        They are moved to the slots where they belong now; all others are given up.

        Returns: nodes of `draft` whose keys and values are in the cache.
        """
        tokens, old, start = reading.text.tokens, reading.draft, reading.read  # type: ignore[union-attr]
        if not len(old):
            return set()
        tip, path = ROOT, []
        while start + len(path) < len(tokens):
            node = old.child(tip, tokens[start + len(path)])
            if node is None:
                break
            path.append(node)
            tip = node
        end = start + len(path)
        again = again_in(old, draft, tip) if end == len(tokens) else {}  # else the text has left the draft
        moves = [(start + node, start + i) for i, node in enumerate(path)]
        moves += [(start + twin, end + node) for node, twin in again.items()]
        moves = [(source, target) for source, target in moves if source != target]
        if moves:
            self.reader.cache.move(self.place(row), *zip(*moves, strict=True))
        self.rolled_back += len(old) - len(path) - len(again)
        reading.read, reading.draft = end, Draft()
        return set(again)

    def _check_factors(self, row: int, reading: Reading, length: int) -> None:
        """Forgets a text that the model must read again, since other rotary factors apply to all of it now."""
        if self.factors is None:
            return
        long = self.factors.long(row, 0, length)
        if long != reading.long:
            self.rolled_back += reading.used
            reading.read, reading.draft, reading.long = 0, Draft(), long

    def _restart(self, reading: Reading, text: Text) -> None:
        """Another text in this row: keep what both have in common."""
        common = 0
        if reading.text is not None:
            old = reading.text.tokens
            while common < min(reading.read, len(text)) and old[common] == text.tokens[common]:
                common += 1
        self.rolled_back += reading.used - common
        reading.text, reading.read, reading.draft = text, common, Draft()

    # Reading.

    def read(self, plans: dict[int, Plan], keep: int) -> Tensor:
        """(batch, keep, vocab) logits of the last `keep` queries of each row.

        One forward; two where rotary factors change between the queries, those for short texts first.

        Args:
            plans: what each row reads, by row; of the others nothing is read.
            keep: how many trailing queries need logits.
        """
        self.reader.fed += sum(len(plan.tokens) for plan in plans.values())
        if self.factors is None:
            return self._read(plans, keep)
        short, long = (self.factors.part(plans, long) for long in (False, True))
        reach = self.factors.switch.length
        if not (short and long):  # as nearly always
            return self._read(plans, keep, reach if long else 0)
        parts = [(short, self._read(short, keep)), (long, self._read(long, keep, reach))]
        logits = parts[0][1].new_zeros(len(self._batch), keep, self.vocab)
        for row in plans:
            own = [found[self.place(row), -len(part[row].tokens) :] for part, found in parts if row in part]
            joined = torch.cat(own)[-keep:]
            logits[self.place(row), -len(joined) :] = joined
        return logits

    def _read(self, plans: dict[int, Plan], keep: int, reach: int = 0) -> Tensor:
        return self._cut(self.reader.read(self._of_batch(plans), keep, reach))

    def _of_batch(self, plans: dict[int, Plan]) -> list[Plan]:
        """One plan for each row of the cache, in its order."""
        return [plans[row] if row in plans else Plan.idle(self._readings[row].used) for row in self._batch]

    def _cut(self, logits: Tensor) -> Tensor:
        """The same of the target's vocabulary: padding rows differ from model to model."""
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[..., : self.vocab] if missing else logits


def _wanted(request: Request) -> Sequence[int]:
    return range(ROOT, len(request.draft)) if request.after is None else request.after
