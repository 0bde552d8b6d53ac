"""A session: one model that reads a batch of texts and drafts, returns logits, and keeps its own KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.cache import cross_attention_cache, import_cache
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.graphs import bucket
from csdraft.decoding.inputs import Inputs, Plan
from csdraft.decoding.interfaces import Context, Request
from csdraft.decoding.ledger import ModelUse
from csdraft.decoding.plans import Reading, plan_of, shared_nodes
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ALONE, ReadingOptions, borrow, take_back
from csdraft.decoding.rotary import RotaryFactors
from csdraft.decoding.scores import Scores, TokenChooser, argmax
from csdraft.decoding.text import Text

__all__ = ["Session"]


class Session:
    """One model and its KV cache, reading a batch of texts.

    The caller states the truth: these texts, these drafts. The session compares that with what its cache holds, moves
    the few slots of an accepted branch, reads what is missing in one forward of the whole batch, and returns the
    logits that were asked for. The cache is never the truth: dropping it between two calls changes speed only.

    Most callers use `score`. Below it, `plan` says what a row must read, and `ask` reads it. `follow` and `step` read
    one drafted token at a time without a new plan.

    Args:
        model: a causal LM or T5-like model.
        chooser: turns its logits into tokens, unless `score` gets another one.
        rows: batch size.
        capacity: slots to reserve for each row.
        sources: the encoder's inputs of an encoder-decoder model.
        vocab: the target's vocabulary size; logits are cut, or padded with -inf, to this width.
        texts: one a row; needed by models with rotary factors that depend on the longest text's length.
        reading: options: whether to reuse the last call's cache, record graphs, keep hidden states.
        use: where it counts what it does.
    """

    def __init__(
        self,
        model: nn.Module,
        chooser: TokenChooser,
        rows: int,
        capacity: int,
        sources: Sources | None,
        vocab: int,
        texts: Sequence[Text] = (),
        reading: ReadingOptions = ALONE,
        use: ModelUse | None = None,
    ):
        self.model, self.chooser, self.vocab, self.use = model, chooser, vocab, use or ModelUse()
        self._reuse = reading.reuse and sources is None
        known = [text.tokens for text in texts] if self._reuse else [()] * rows if reading.graphs else ()
        self.reader, held = borrow(model, rows, capacity, known, reading.taps)
        self.reader.begin(sources, self.reader.vocab < vocab, reading.graphs, self.use)
        switch = self.reader.traits.switch
        self.factors = RotaryFactors(switch, texts) if switch and texts and not switch.every_token else None
        if texts:
            self.reader.set_prompts([text.prompt_length for text in texts], [0] * rows)
        self._batch = list(range(rows))  # batch index of the cache -> row; shrinks when rows end
        self._readings = {row: Reading() for row in range(rows)}
        self._unproven: dict[int, tuple[int, list[Tensor]]] = {}  # row -> slot of a reused token, its keys and values
        self.pinned = False  # whether ended rows must stay, since the caller gets the cache
        self.imported = 0
        for row, count in enumerate(held):
            if count:  # tokens of an earlier call's cache; the last one is read again to check the others
                self._readings[row] = Reading(texts[row], count - 1)
                self._unproven[row] = count - 1, self.reader.cache.at(row, count - 1)
                self.imported += count
                self.use.rolled_back += 1

    def close(self) -> None:
        """Called when a call ends without an error: keeps the cache for the model's next call."""
        readings = list(self._readings.values())
        if self._reuse and self._batch == list(self._readings) and all(reading.text for reading in readings):
            take_back(self.reader, [reading.text.tokens[: reading.read] for reading in readings])  # type: ignore
        elif self.reader.graphs is not None:
            take_back(self.reader, [()] * len(readings))  # no text to reuse, but its recorded graphs

    @property
    def kept(self) -> int:
        """Tokens that the cache holds now."""
        return sum(reading.used for reading in self._readings.values())

    @property
    def positions(self) -> int:
        """How many positions the model has; a large number for rotary models, which have no limit."""
        return self.reader.last_position + 1

    def left(self, context: Context) -> int:
        """How many tokens it can draft at a place."""
        return self.positions - len(context.text) - context.draft.depth(context.tip)

    def place(self, row: int) -> int:
        """The batch index of a row."""
        return self._batch.index(row)

    def room(self, row: int, text: Text) -> int:
        """How many drafted tokens may follow `text` so that one forward can still read both."""
        room = max(self.positions - len(text), 0)
        return room if self.factors is None else min(room, self.factors.room(row, len(text)))

    def unread(self, row: int, text: Text) -> int:
        """How many tokens of `text` the model has not read yet."""
        reading = self._readings[row]
        return len(text) - (reading.read if reading.text is text else 0)

    def preload(self, cache: object, texts: Sequence[Text], kept: Tensor) -> None:
        """Copies in a cache that the user gave, which holds each text but for its last tokens.

        Args:
            kept: (rows, length) bool, True where the cache holds a token, False for padding.
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
        if self.reader.taps:
            self._read_again(texts, read)

    def _read_again(self, texts: Sequence[Text], read: Sequence[int]) -> None:
        """Reads what a user's cache holds, which has no features: (rows,) `read` tokens of each text."""
        held = [(row, count - 1) for row, count in enumerate(read) if count]
        self._unproven = {row: (slot, self.reader.cache.at(row, slot)) for row, slot in held}
        for reading in self._readings.values():
            self.use.rolled_back += reading.read
            reading.text, reading.read = None, 0
        self.read({row: self.plan(Request(row, text, Draft(), (ROOT,)))[0] for row, text in enumerate(texts)}, 1)
        if not self._prove(range(len(texts)), 4):  # read in other shapes, bfloat16 came to 0.9 of the usual distance
            raise ValueError(
                f"{GENERATE_CACHE} holds something else than these tokens, such as images, and the drafter needs the "
                "hidden states of that; use one that needs none, such as MaxGram(), or leave assistant= out"
            )

    def forget(self) -> None:
        """Drops everything that the cache holds. This costs time and never changes the output."""
        self._unproven.clear()
        for reading in self._readings.values():
            self.use.rolled_back += reading.used
            reading.text, reading.read, reading.draft = None, 0, Draft()

    def settle(self, texts: Sequence[Text], length: int) -> None:
        """Prepares the cache for `export_cache`: reads every text up to column `length` of the padded batch.

        Like plain `generate`, which never reads the last token of the longest text.
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
        """Removes ended rows from the batch. With recorded graphs, only once the rest fit a smaller power of two."""
        if self.pinned or (self.reader.graphs is not None and bucket(len(live)) >= len(self._batch)):
            return
        self._unproven.clear()
        places, count = {self.place(row) for row in live}, len(live)
        behind = sorted(place for place in places if place >= count)
        order = [place if place in places else behind.pop() for place in range(count)]  # last rows move into the gaps
        self.reader.keep_rows(order)
        self._batch = [self._batch[place] for place in order]

    def score(
        self, requests: Sequence[Request], choose: bool = True, chooser: TokenChooser | None = None
    ) -> list[Scores]:
        """The logits after the wanted nodes of each request, from one forward of the whole batch.

        Args:
            choose: whether `Scores.choice` will be called; then all choices may be computed at once.
            chooser: turns logits into tokens; None: the session's own.
        """
        chooser = chooser or self.chooser
        plans, queries, logits = self.ask(requests)  # logits: (batch, queries, vocab)
        views = []  # (wanted, vocab) logits of each request
        for request in requests:
            own, cut = logits[self.place(request.row)], len(plans[request.row].tokens) - logits.shape[1]
            at = [query - cut for query in queries[request.row]]  # rows of a batch end together: `cut` may be negative
            views.append(own[at[0] : at[-1] + 1] if at == list(range(at[0], at[-1] + 1)) else own[at])
        choices = self._choose(requests, views, chooser) if choose else [None] * len(requests)
        return [
            Scores(chooser, request, view, chosen)
            for request, view, chosen in zip(requests, views, choices, strict=True)
        ]

    def ask(self, requests: Sequence[Request]) -> tuple[dict[int, Plan], dict[int, list[int]], Tensor]:
        """Reads what is missing, in one forward of the whole batch.

        Returns: the plan of each row; for each row, which queries of its plan are the wanted nodes; and (batch,
            queries, vocab) logits of the last queries, as many as the neediest row wants.
        """
        plans, queries = {}, {}
        for request in requests:
            plans[request.row], queries[request.row] = self.plan(request)
        keep = max(len(plans[row].tokens) - min(at) for row, at in queries.items())
        logits = self.read(plans, keep)
        if self._unproven and not self._prove(plans):  # the model has changed since the cache was written
            self.forget()
            return self.ask(requests)
        return plans, queries, logits

    def _prove(self, rows: Iterable[int], lenience: float = 1) -> bool:
        """Whether the reused tokens that were read again gave the same keys and values as before."""
        again, moved = self._unproven.keys() & rows, self.reader.cache.moved
        norms = [norm for row in again for norm in moved(self.place(row), *self._unproven.pop(row))]  # (2, buffers)
        close = lenience * 2 * torch.finfo(self.reader.dtype).eps ** 0.75
        values = torch.cat([norm.to(self.reader.device) for norm in norms], 1).tolist() if norms else [[], []]
        return not any(distance > close * size for distance, size in zip(*values, strict=True))

    def _choose(
        self, requests: Sequence[Request], views: Sequence[Tensor], chooser: TokenChooser
    ) -> Sequence[list[int] | None]:
        """All choices of the batch at once; None for each request where choosing one by one is cheaper.

        On a CPU, one by one is cheaper for trees, where most choices are never asked for, under coupled draws, where
        each choice needs its own noise, and with processors that must know which tokens a text has.
        """
        sampler, processing = chooser.sampler, chooser.processing
        in_one_go = sampler.greedy and not processing.reads_tokens and all(r.draft.is_chain for r in requests)
        chosen = sampler.greedy or sampler.coupled
        if (self.reader.on_host and not in_one_go) or not chosen or not processing.at_once:
            return [None] * len(views)
        if self.reader.on_host and not processing.processors:
            return [argmax(view) for view in views]  # without a copy of all logits
        drafted = [request.draft.tokens for request in requests]
        along = {tokens.choices: None for tokens in drafted if isinstance(tokens, Awaited) and tokens.waiting}
        return chooser.choose_all(requests, views, list(along))

    def features(self, row: int, text: Text, stop: int) -> dict[int, Tensor]:
        """By tap, the model's (stop, hidden) hidden states of the first `stop` tokens of a row's text.

        Most are in the cache already. The last one or two tokens of a text that has just grown are read first.
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
        """The inputs of a chain's next step: (batch,) tokens after what `plans` have read. See `Reader.follow`."""
        return self.reader.follow(self._of_batch(plans), tokens)

    def step(self, inputs: Inputs) -> Tensor:
        """(batch, vocab) logits after one more token in every row. See `Reader.step`."""
        return self._cut(self.reader.step(inputs))

    def drafted(self, row: int, tokens: Sequence[int], surplus: int) -> None:
        """Records which tokens `step` has read for a row, and how many more it read that are not used."""
        reading = self._readings[row]
        reading.draft = reading.draft.extend(tokens, 0)
        self.use.fed += len(tokens) + surplus
        self.use.rolled_back += surplus

    # Comparing the request with the cache.

    def plan(self, request: Request) -> tuple[Plan, list[int]]:
        """What must be read so that the cache holds the request's text and draft; updates the row's `Reading`.

        Returns: the plan, and which queries of the plan are the wanted nodes.
        """
        row, text, draft = request.row, request.text, request.draft
        reading, length, wanted = self._readings[row], len(request.text), request.after
        if reading.text is not text:
            self._restart(reading, text)
        self._check_factors(row, reading, length)
        grows = reading.read == length and draft.continues(reading.draft)
        cached = range(len(reading.draft)) if grows else self._keep(row, reading, draft)
        first = min(reading.read, length - 1) if ROOT in wanted else reading.read
        again = set(wanted).intersection(cached)
        self.use.rolled_back += reading.read - first + len(again)
        nodes = [node for node in range(len(draft)) if node not in cached or node in again]
        reading.read, reading.draft = length, draft
        at = {node: length - first + i for i, node in enumerate(nodes)} | {ROOT: length - first - 1}
        return plan_of(text, draft, first, nodes), [at[node] for node in wanted]

    def _keep(self, row: int, reading: Reading, draft: Draft) -> set[int]:
        """Keeps the cached nodes that are still needed: those that became text, and those that are also in `draft`.

        It moves both to the slots where they belong now, and drops all other nodes.

        Returns: the nodes of `draft` that are in the cache.
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
        shared = shared_nodes(old, draft, tip) if end == len(tokens) else {}
        moves = [(start + node, start + i) for i, node in enumerate(path)]  # (from slot, to slot)
        moves += [(start + twin, end + node) for node, twin in shared.items()]
        moves = [(source, target) for source, target in moves if source != target]
        if moves:
            self.reader.cache.move(self.place(row), *zip(*moves, strict=True))
        self.use.rolled_back += len(old) - len(path) - len(shared)
        reading.read, reading.draft = end, Draft()
        return set(shared)

    def _check_factors(self, row: int, reading: Reading, length: int) -> None:
        """Drops what was read of a row's text if all of it now needs other rotary factors than it was read with."""
        if self.factors is None:
            return
        long = self.factors.long(row, 0, length)
        if long != reading.long:
            self.use.rolled_back += reading.used
            reading.read, reading.draft, reading.long = 0, Draft(), long

    def _restart(self, reading: Reading, text: Text) -> None:
        """Switches the row to another text: keeps the tokens that both texts begin with."""
        common = 0
        if reading.text is not None:
            old = reading.text.tokens
            while common < min(reading.read, len(text)) and old[common] == text.tokens[common]:
                common += 1
        self.use.rolled_back += reading.used - common
        reading.text, reading.read, reading.draft = text, common, Draft()

    # Reading.

    def read(self, plans: dict[int, Plan], keep: int) -> Tensor:
        """(batch, keep, vocab) logits of the last `keep` queries of each row.

        One forward; two if some queries need the rotary factors for long texts and others those for short ones.

        Args:
            plans: what each row reads, by row; rows that are missing read nothing.
            keep: how many trailing queries need logits.
        """
        self.use.fed += sum(len(plan.tokens) for plan in plans.values())
        if self.factors is None:
            return self._read(plans, keep)
        short, long = (self.factors.part(plans, long) for long in (False, True))
        reach = self.factors.switch.length
        if not (short and long):  # the usual case
            return self._read(plans, keep, reach if long else 0)
        parts = [(short, self._read(short, keep)), (long, self._read(long, keep, reach))]
        logits = parts[0][1].new_zeros(len(self._batch), keep, self.vocab)  # (batch, keep, vocab)
        for row in plans:
            own = [found[self.place(row), -len(part[row].tokens) :] for part, found in parts if row in part]
            joined = torch.cat(own)[-keep:]  # (<= keep, vocab)
            logits[self.place(row), -len(joined) :] = joined
        return logits

    def _read(self, plans: dict[int, Plan], keep: int, reach: int = 0) -> Tensor:
        return self._cut(self.reader.read(self._of_batch(plans), keep, reach))

    def _of_batch(self, plans: dict[int, Plan]) -> list[Plan]:
        """One plan for each batch index of the cache; rows without a plan get one that reads nothing."""
        return [plans[row] if row in plans else Plan.idle(self._readings[row].used) for row in self._batch]

    def _cut(self, logits: Tensor) -> Tensor:
        """(..., vocab) the logits with the target's vocabulary size: models pad their vocabularies differently."""
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[..., : self.vocab] if missing else logits
