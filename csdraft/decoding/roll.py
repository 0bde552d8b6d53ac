"""Autoregressive drafting: a session's model writes token after token, kept on the device where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from csdraft.decoding.interfaces import Context, Request, Stop
from csdraft.decoding.runner import Feed
from csdraft.decoding.scores import argmax, entropy
from csdraft.decoding.session import Session

__all__ = ["Rolled", "roll"]


@dataclass
class Rolled:
    """What a roll drew for one row: tokens, and on demand their confidence and the laws they were drawn from."""

    tokens: list[int] = field(default_factory=list)
    confidence: list[float] | None = None
    laws: list[Tensor | None] | None = None


def roll(
    session: Session,
    contexts: Sequence[Context],
    steps: Sequence[int],
    confidence: bool = False,
    stops: Sequence[Stop | None] | None = None,
    on_device: bool | None = None,
) -> list[Rolled]:
    """Draws `steps[i]` tokens after each context: equal, token for token, to so many calls of score and choice.

    Args:
        contexts: where to go on from.
        steps: (rows,) tokens wanted; a row also ends on an end-of-text token, or when its `stop` says so.
        confidence: whether to compute each token's softmax probability.
        stops: per row, asked about each token kept; see `Budget`.
        on_device: draw without looking at the tokens, and copy them to the host once; where the model is on an
            accelerator if None, and only where nothing has to see a token before the next is drawn.
    """
    live = [i for i, wanted in enumerate(steps) if wanted > 0]
    plans = {}
    for i in live:
        context = contexts[i]
        chain = context.draft.only(context.draft.path(context.tip))
        plans[context.row], _ = session.plan(Request(context.row, context.text, chain, (chain.tip,)))
    sampler, blind = session.head.sampler, session.head.processing.text_blind
    watched = confidence or any(stops or ()) or not blind or not (sampler.greedy or sampler.coupled)
    if on_device is None:
        on_device = session.runner.device.type != "cpu"
    if on_device and not watched:
        return _unwatched(session, contexts, steps, live, plans)
    return _step_by_step(session, contexts, steps, live, plans, confidence, stops or [None] * len(contexts))


def _step_by_step(
    session: Session,
    contexts: Sequence[Context],
    steps: Sequence[int],
    live: list[int],
    plans: dict[int, Feed],
    confidence: bool,
    stops: Sequence[Stop | None],
) -> list[Rolled]:
    """Every token is seen on the host before the next is drawn."""
    head = session.head
    independent = not head.sampler.greedy and not head.sampler.coupled
    rolled = [Rolled([], [] if confidence else None, [] if independent else None) for _ in contexts]
    while live:
        logits = session.forward(plans, 1)
        places = [session.place(contexts[i].row) for i in live]
        tokens = _draw(session, [contexts[i] for i in live], [rolled[i] for i in live], logits.select(1, -1), places)
        plans, going = {}, []
        for i, place, token in zip(live, places, tokens, strict=True):
            row, stop = contexts[i].row, stops[i]
            rolled[i].tokens.append(token)
            ended = token in head.stopping.eos or len(rolled[i].tokens) >= steps[i]
            if confidence or stop is not None:
                probs = _soft(session, logits[place, -1])
                sure = float(probs[token])
                if confidence:
                    rolled[i].confidence.append(sure)  # type: ignore[union-attr]
                ended |= stop is not None and stop(sure, partial(entropy, probs))
            if not ended:
                going.append(i)
                plans[row] = session.append(row, token)
        live = going
    for context, drawn in zip(contexts, rolled, strict=True):
        if len(drawn.tokens) > 1:
            session.appended(context.row, drawn.tokens[:-1])  # the last one was never fed
    return rolled


def _draw(
    session: Session, contexts: Sequence[Context], rolled: Sequence[Rolled], logits: Tensor, places: Sequence[int]
) -> list[int]:
    """The next token of every live row from (batch, vocab) logits; laws are noted where they will be needed."""
    head, sampler = session.head, session.head.sampler
    if sampler.greedy and head.processing.text_blind:
        return argmax(head.processing.all_at_once(logits if len(places) == len(logits) else logits[places]))
    tokens = []
    for context, so_far, place in zip(contexts, rolled, places, strict=True):
        path = [*context.path, *so_far.tokens]
        scores = head.processed(context.row, context.text, path, logits[place])
        if so_far.laws is None:
            tokens.append(head.choose(context.row, len(context.text) + len(path), scores))
        else:
            so_far.laws.append(scores.float().softmax(-1))
            tokens.append(sampler.draw(context.row, so_far.laws[-1]))  # type: ignore[arg-type]
    return tokens


def _soft(session: Session, logits: Tensor) -> Tensor:
    """(vocab,) the model's softmax at the call's temperature (1 when greedy)."""
    temperature = 1.0 if session.head.sampler.greedy else session.head.processing.temperature
    return (logits.float() / temperature).softmax(-1)


def _unwatched(
    session: Session, contexts: Sequence[Context], steps: Sequence[int], live: list[int], plans: dict[int, Feed]
) -> list[Rolled]:
    """All tokens are drawn on the device, each fed to the next step as it is, and copied to the host at the end."""
    head, ids, columns = session.head, None, []
    places = {i: session.place(contexts[i].row) for i in live}
    starts = {i: len(contexts[i].text) + len(contexts[i].path) for i in live}
    for step in range(max(steps, default=0)):
        scores = head.processing.all_at_once(session.forward(plans, 1, ids)[:, -1]).float()
        if not head.sampler.greedy:
            scores = scores.clone()
            for i, place in places.items():
                scores[place] -= head.sampler.log_exponential(contexts[i].row, starts[i] + step, scores.device)
        best = scores.max(-1)
        columns.append(torch.stack([best.indices.double(), best.values.double()]))
        ids = best.indices[:, None]
        plans = {contexts[i].row: session.append(contexts[i].row, 0) for i in live if step + 1 < steps[i]}
    rolled = [Rolled() for _ in contexts]
    if not columns:
        return rolled
    drawn, values = torch.stack(columns, 1).tolist()  # (2, steps, batch): the one copy
    for i, place in places.items():
        tokens = [int(column[place]) for column in drawn[: steps[i]]]
        if any(column[place] != column[place] for column in values[: steps[i]]):
            raise ValueError("the drafter's logits are nan; check its dtype (fp16 overflows where bf16 does not)")
        session.appended(contexts[i].row, tokens[:-1])
        ends = [at for at, token in enumerate(tokens) if token in head.stopping.eos]
        rolled[i].tokens = tokens[: ends[0] + 1] if ends else tokens
    return rolled
