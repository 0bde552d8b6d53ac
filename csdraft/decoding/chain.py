"""Drafting a chain: a model writes one token after another; each is chosen and read again on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from csdraft.decoding.awaited import Awaited, Choices
from csdraft.decoding.interfaces import Context, Request, Stop
from csdraft.decoding.processing import Before
from csdraft.decoding.scores import NAN as NAN_LOGITS
from csdraft.decoding.scores import TokenChooser, argmax, entropy
from csdraft.decoding.session import Session

__all__ = ["Chain", "draft_chain"]

NAN = float("nan")


@dataclass(eq=False)
class Chain:
    """The chain of one row.

    Attributes:
        place: the row's batch index.
        wanted: number of tokens to draft.
        tokens: (drafted,) so far.
        confidence, draft_probs: (drafted,) softmax probabilities and (vocab,) distributions, if asked for.
    """

    context: Context
    place: int
    wanted: int
    stop: Stop | None
    confidence: list[float] | None
    draft_probs: list[Tensor | None] | None
    tokens: list[int] | Awaited = field(default_factory=list)
    ended: bool = False

    @property
    def position(self) -> int:
        """Position of the next token, counting only tokens that the host has seen."""
        return len(self.context.text) + self.context.draft.depth(self.context.tip) + len(self.tokens)


def draft_chain(
    session: Session,
    contexts: Sequence[Context],
    wanted: Sequence[int],
    confidence: bool = False,
    stops: Sequence[Stop | None] | None = None,
) -> list[Chain]:
    """Drafts `wanted[i]` tokens after context i. They equal those of `wanted[i]` calls of `score` and `choice`.

    On an accelerator, unless a processor reads the text, tokens stay on the device until the end of the chain. Tokens
    after a stop are then cut off. That gives the same draft, since a `stop` never looks at later tokens. If no `stop`
    or confidence is asked for, the tokens are `Awaited`. They may continue past the end of a text; the review ends
    there.

    Args:
        contexts: where to continue from.
        wanted: (rows,) numbers of tokens; a row also ends on an end-of-text token, or when its `stop` returns True.
        confidence: whether to compute each token's softmax probability.
        stops: (rows,) called after each drafted token; see `Budget`.
    """
    chooser = session.chooser
    independent = not chooser.sampler.greedy and not chooser.sampler.coupled
    result = [
        Chain(
            context, session.place(context.row), number, stop, [] if confidence else None, [] if independent else None
        )
        for context, number, stop in zip(contexts, wanted, stops or [None] * len(contexts), strict=True)
    ]
    rows = [row for row in result if row.wanted > 0]
    if not rows:
        return result
    on_host = session.reader.on_host or not chooser.processing.at_once
    on_host = on_host or any(chooser.processing.ignores_new(row.context.row, row.context.text) for row in rows)
    chains: ChainChooser = OnHost(chooser, rows) if on_host else OnDevice(chooser, rows)
    begun = [(row.context, row.context.draft.main_branch) for row in rows]
    plans, _, logits = session.ask([Request(c.row, c.text, draft, (draft.tip,)) for c, draft in begun])
    logits, inputs, steps = logits[:, -1], None, 1  # (batch, vocab)
    while True:
        tokens = chains.choose(logits)  # (batch,)
        if steps == max(wanted) or all(row.ended for row in rows):  # as far as the host knows
            break
        if inputs is None:
            inputs = session.follow(plans, tokens)
        else:
            inputs.advance(tokens, session.positions - 1)
        logits = session.step(inputs)
        steps += 1
    chains.finish()
    for row in rows:
        fed = len(row.tokens) - 1  # the model never read the last one
        session.drafted(row.context.row, row.tokens[:fed], steps - 1 - fed)
    return result


class ChainChooser:
    """Chooses the next token of every row. There is one subclass for CPUs and one for accelerators.

    Args:
        chooser: turns logits into tokens.
        rows: the rows that draft.
    """

    def __init__(self, chooser: TokenChooser, rows: Sequence[Chain]):
        self.chooser, self.rows = chooser, rows
        self.watched = any(row.stop is not None or row.confidence is not None for row in rows)

    def choose(self, logits: Tensor) -> Tensor | list[int]:
        """(batch,) the next token of every row, from (batch, vocab) logits; 0 for rows that do not draft.

        A tensor on the device, or a list if the host has seen the tokens.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Called once at the end; it must complete the rows."""

    def take(self, row: Chain, token: int, sure: float = NAN, unsure: Callable[[], float] = lambda: NAN) -> None:
        """Adds a token to a row, with its confidence and entropy if `watched`, and decides whether the row ends."""
        assert isinstance(row.tokens, list)
        row.tokens.append(token)
        if row.confidence is not None:
            row.confidence.append(sure)
        row.ended = token in self.chooser.stopping.eos or len(row.tokens) >= row.wanted
        if row.stop is not None:
            row.ended |= row.stop(sure, unsure)


class OnHost(ChainChooser):
    """The host sees every token before the next is drawn, so the chain ends when the last row does."""

    def choose(self, logits: Tensor) -> list[int]:
        live = [row for row in self.rows if not row.ended]
        ids = [0] * logits.shape[0]
        for row, token in zip(live, self._tokens(live, logits), strict=True):
            ids[row.place] = token
            if self.watched:
                probs = self.chooser.soft(logits[row.place])
                self.take(row, token, float(probs[token]), partial(entropy, probs))
            else:
                self.take(row, token)
        return ids

    def _tokens(self, live: Sequence[Chain], logits: Tensor) -> list[int]:
        chooser, sampler = self.chooser, self.chooser.sampler
        if sampler.greedy and chooser.processing.at_once and not chooser.processing.reads_tokens:
            batch, before = logits.shape[0], None
            if batch > 1 and (places := [row.place for row in live]) != list(range(batch)):
                logits = logits[places]  # (live, vocab)
            if not chooser.processing.text_blind:
                before = Before([row.position + row.context.text.padding for row in live])
            return argmax(chooser.processing.all_at_once(logits, before))
        tokens = []
        for row in live:
            context, path = row.context, [*row.context.path, *row.tokens]
            scores = chooser.processed(context.row, context.text, path, logits[row.place])
            if row.draft_probs is None:
                tokens.append(chooser.choose(context.row, row.position, scores))
            else:
                row.draft_probs.append(scores.float().softmax(-1))
                tokens.append(sampler.draw(context.row, row.draft_probs[-1]))  # type: ignore[arg-type]
        return tokens


class OnDevice(ChainChooser):
    """Nothing is copied to the host before the end: one copy for all steps and rows.

    If only tokens are wanted, they stay on the device as `Awaited`.
    """

    def __init__(self, chooser: TokenChooser, rows: Sequence[Chain]):
        super().__init__(chooser, rows)
        self._columns: list[Tensor] = []  # per step (4, batch): token, its score, confidence, entropy
        self._seen: Tensor | None = None  # (batch, vocab + 1) bool: the tokens before the next one, where it matters

    def choose(self, logits: Tensor) -> Tensor:
        scores = self.chooser.processing.all_at_once(logits, self._before(logits)).float()  # (batch, vocab)
        if not self.chooser.sampler.greedy:
            scores = scores - self._noise(scores)
        best = scores.max(-1)
        column = [best.indices.double(), best.values.double()]
        if self.watched:
            probs = self.chooser.soft(logits)  # (batch, vocab)
            column += [
                probs.gather(1, best.indices[:, None])[:, 0].double(),
                torch.special.entr(probs).sum(-1).double(),
            ]
        self._columns.append(torch.stack(column))  # (2 or 4, batch)
        if self._seen is not None:
            self._seen.scatter_(1, best.indices[:, None], True)
        return best.indices

    def _before(self, logits: Tensor) -> Before | None:
        """What processors must know about the texts, for (batch, vocab) logits."""
        processing = self.chooser.processing
        if processing.text_blind:
            return None
        batch, vocab = logits.shape
        lengths = [0] * batch  # 0 for rows that do not draft
        for row in self.rows:
            lengths[row.place] = row.position + row.context.text.padding + len(self._columns)
        if not processing.reads_tokens:
            return Before(lengths)
        if self._seen is None:
            self._seen = torch.zeros(batch, vocab + 1, dtype=torch.bool, device=logits.device)
            for row in self.rows:
                tip = Request(row.context.row, row.context.text, row.context.draft, [row.context.tip])
                self._seen[row.place, :-1] = processing.seen(tip, logits)[0]
        return Before(lengths, self._seen[:, :-1])

    def _noise(self, scores: Tensor) -> Tensor:
        """(batch, vocab) the noise of the next position; under independent draws new noise."""
        noise, sampler = torch.zeros_like(scores), self.chooser.sampler
        if sampler.coupled:
            found = sampler.noise([(r.context.row, r.position + len(self._columns)) for r in self.rows], scores.device)
            for row, own in zip(self.rows, found, strict=True):  # a list of indices would be copied to the device
                noise[row.place] = own
            return noise
        for row in self.rows:
            noise[row.place] = sampler.fresh_log_exponential(row.context.row, scores.device)
            row.draft_probs.append(scores[row.place].softmax(-1))  # type: ignore[union-attr]
        return noise

    def finish(self) -> None:
        table = torch.stack(self._columns)  # (steps, 2 or 4, batch)
        if not self.watched and all(row.draft_probs is None for row in self.rows):
            choices = Choices(table)
            for row in self.rows:
                row.tokens = Awaited(choices, row.place, min(row.wanted, len(table)))
            return
        columns = table.tolist()  # the one copy
        for row in self.rows:
            for column in columns:
                token, score, *sure = (values[row.place] for values in column)
                if score != score:
                    raise ValueError(NAN_LOGITS)
                if not row.ended:
                    self.take(row, int(token), *sure[:1], *(partial(float, value) for value in sure[1:]))
            if row.draft_probs is not None:
                del row.draft_probs[len(row.tokens) :]
