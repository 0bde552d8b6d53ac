"""Drafting a chain: a model writes token after token, each chosen where it was computed and read again from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from csdraft.decoding.awaited import Awaited, Choices
from csdraft.decoding.interfaces import Context, Request, Stop
from csdraft.decoding.scores import NAN as NAN_LOGITS
from csdraft.decoding.scores import TokenChooser, argmax, entropy
from csdraft.decoding.session import Session

__all__ = ["Drawn", "draft_chain"]

NAN = float("nan")


@dataclass
class Drawn:
    """What was drawn for one row: tokens, and on demand their confidence and the distributions they are from."""

    tokens: list[int] | Awaited = field(default_factory=list)
    confidence: list[float] | None = None
    draft_probs: list[Tensor | None] | None = None


@dataclass(eq=False)
class Row:
    """One row of a chain that grows: its place in the batch, the tokens wanted, and what has come of it."""

    context: Context
    place: int
    wanted: int
    stop: Stop | None
    drawn: Drawn
    ended: bool = False

    @property
    def position(self) -> int:
        """Of the token that comes next, as far as the host knows."""
        return len(self.context.text) + len(self.context.path) + len(self.drawn.tokens)


def draft_chain(
    session: Session,
    contexts: Sequence[Context],
    wanted: Sequence[int],
    confidence: bool = False,
    stops: Sequence[Stop | None] | None = None,
) -> list[Drawn]:
    """Draws `wanted[i]` tokens after each context: equal, token for token, to so many calls of score and choice.

    Where the host need not see a token before the next is drawn (on an accelerator, unless a processor reads the
    text), nothing is copied before the end. What follows a token to stop at is then cut off: that changes nothing,
    since a `stop` looks at no later token. Where nobody asks about tokens, they are `Awaited`, and may go on behind
    the end of a text: their review ends there.

    Args:
        contexts: where to go on from.
        wanted: (rows,) numbers of tokens; a row also ends on an end-of-text token, or when its `stop` says so.
        confidence: whether to compute each token's softmax probability.
        stops: per row, asked about each token kept; see `Budget`.
    """
    chooser, requests, rows = session.chooser, [], []
    independent = not chooser.sampler.greedy and not chooser.sampler.coupled
    result = [Drawn([], [] if confidence else None, [] if independent else None) for _ in contexts]
    for context, number, stop, drawn in zip(contexts, wanted, stops or [None] * len(contexts), result, strict=True):
        if number > 0:
            chain = context.draft.only(context.draft.path(context.tip))
            requests.append(Request(context.row, context.text, chain, (chain.tip,)))
            rows.append(Row(context, session.place(context.row), number, stop, drawn))
    if not rows:
        return result
    on_host = session.reader.on_host or not chooser.processing.text_blind
    growing: Growing = OnHost(chooser, rows) if on_host else OnDevice(chooser, rows)
    plans, _, logits = session.ask(requests)
    logits, inputs, steps = logits[:, -1], None, 1  # (batch, vocab)
    while True:
        tokens = growing.choose(logits)  # (batch,)
        if steps == max(wanted) or growing.all_ended:
            break
        if inputs is None:
            inputs = session.follow(plans, tokens)
        else:
            inputs.advance(tokens, session.positions - 1)
        logits = session.step(inputs)
        steps += 1
    growing.finish()
    for row in rows:
        fed = len(row.drawn.tokens) - 1  # the last one was never read
        session.drafted(row.context.row, row.drawn.tokens[:fed], steps - 1 - fed)
    return result


class Growing:
    """Chooses the next token of every row, as one kind of machine does it best.

    Args:
        chooser: how logits become tokens.
        rows: those that draft.
    """

    def __init__(self, chooser: TokenChooser, rows: Sequence[Row]):
        self.chooser, self.rows = chooser, rows
        self.watched = any(row.stop is not None or row.drawn.confidence is not None for row in rows)

    @property
    def all_ended(self) -> bool:
        """Whether no row needs another token, as far as the host knows."""
        return all(row.ended for row in self.rows)

    def choose(self, logits: Tensor) -> Tensor | list[int]:
        """(batch,) the next token of every row, from (batch, vocab) logits; 0 where nobody drafts.

        On the device, or a list where the host has seen them.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Called once: now `Row.drawn` must be complete."""

    def soft(self, logits: Tensor) -> Tensor:
        """The softmax of (..., vocab) logits at the call's temperature (1 when greedy)."""
        temperature = 1.0 if self.chooser.sampler.greedy else self.chooser.processing.temperature
        return (logits.float() / temperature).softmax(-1)

    def take(self, row: Row, token: int, sure: float = NAN, unsure: Callable[[], float] = lambda: NAN) -> None:
        """Adds a token to a row, and asks whether it is the last one; its confidence and entropy where watched."""
        assert isinstance(row.drawn.tokens, list)
        row.drawn.tokens.append(token)
        if row.drawn.confidence is not None:
            row.drawn.confidence.append(sure)
        row.ended = token in self.chooser.stopping.eos or len(row.drawn.tokens) >= row.wanted
        if row.stop is not None:
            row.ended |= row.stop(sure, unsure)


class OnHost(Growing):
    """Every token is seen before the next is drawn: the chain ends with the last row that needs another."""

    def choose(self, logits: Tensor) -> list[int]:
        live = [row for row in self.rows if not row.ended]
        ids = [0] * len(logits)
        for row, token in zip(live, self._tokens(live, logits), strict=True):
            ids[row.place] = token
            if self.watched:
                probs = self.soft(logits[row.place])
                self.take(row, token, float(probs[token]), partial(entropy, probs))
            else:
                self.take(row, token)
        return ids

    def _tokens(self, live: Sequence[Row], logits: Tensor) -> list[int]:
        chooser, sampler = self.chooser, self.chooser.sampler
        if sampler.greedy and chooser.processing.text_blind:
            places = [row.place for row in live]
            of_all = places == list(range(len(logits)))  # and in the batch's order
            return argmax(chooser.processing.all_at_once(logits if of_all else logits[places]))
        tokens = []
        for row in live:
            context, drawn = row.context, row.drawn
            path = [*context.path, *drawn.tokens]
            scores = chooser.processed(context.row, context.text, path, logits[row.place])
            if drawn.draft_probs is None:
                tokens.append(chooser.choose(context.row, row.position, scores))
            else:
                drawn.draft_probs.append(scores.float().softmax(-1))
                tokens.append(sampler.draw(context.row, drawn.draft_probs[-1]))  # type: ignore[arg-type]
        return tokens


class OnDevice(Growing):
    """Nothing is seen before the end, in one copy for all steps and rows; tokens alone, only with their review."""

    def __init__(self, chooser: TokenChooser, rows: Sequence[Row]):
        super().__init__(chooser, rows)
        self._columns: list[Tensor] = []  # per step (4, batch): token, its score, confidence, entropy

    def choose(self, logits: Tensor) -> Tensor:
        scores = self.chooser.processing.all_at_once(logits).float()
        if not self.chooser.sampler.greedy:
            scores = scores - self._noise(scores)
        best = scores.max(-1)
        column = [best.indices.double(), best.values.double()]
        if self.watched:
            probs = self.soft(logits)
            column += [
                probs.gather(1, best.indices[:, None])[:, 0].double(),
                torch.special.entr(probs).sum(-1).double(),
            ]
        self._columns.append(torch.stack(column))
        return best.indices

    def _noise(self, scores: Tensor) -> Tensor:
        """(batch, vocab) of the position that comes next, or fresh where draws are independent."""
        noise, sampler = torch.zeros_like(scores), self.chooser.sampler
        if sampler.coupled:
            places = [(row.context.row, row.position + len(self._columns)) for row in self.rows]
            noise[[row.place for row in self.rows]] = sampler.noise(places, scores.device)
            return noise
        for row in self.rows:
            noise[row.place] = sampler.fresh_log_exponential(row.context.row, scores.device)
            row.drawn.draft_probs.append(scores[row.place].softmax(-1))  # type: ignore[union-attr]
        return noise

    def finish(self) -> None:
        table = torch.stack(self._columns)  # (steps, 2 or 4, batch)
        if not self.watched and all(row.drawn.draft_probs is None for row in self.rows):
            choices = Choices(table)
            for row in self.rows:
                row.drawn.tokens = Awaited(choices, row.place, min(row.wanted, len(table)))
            return
        columns = table.tolist()  # the one copy
        for row in self.rows:
            for column in columns:
                token, score, *sure = (values[row.place] for values in column)
                if score != score:
                    raise ValueError(NAN_LOGITS)
                if not row.ended:
                    self.take(row, int(token), *sure[:1], *(partial(float, value) for value in sure[1:]))
            if row.drawn.draft_probs is not None:
                del row.drawn.draft_probs[len(row.drawn.tokens) :]
