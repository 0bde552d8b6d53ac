"""A session on a random walk: texts that grow, drafts that change, rows that come and go; and the truth beside it.

The truth is one ordinary forward a path: no cache, no padding, no mask, none of csdraft's code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csdraft.decoding.chain import draft_chain
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context, Request
from csdraft.decoding.processing import Processing
from csdraft.decoding.reader import Sources
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from tests import tiny

TOKENS = (5, 17, 40)
"""Few, so that drafts often repeat what is cached."""


def open_session(model: nn.Module, rows: int) -> Session:
    """A greedy session without processors."""
    sources = None
    if model.config.is_encoder_decoder:
        inputs = tiny.inputs_of("t5", rows)
        with torch.no_grad():
            sources = Sources(*inputs.values(), model.get_encoder()(**inputs))
    chooser = TokenChooser(Processing([], rows), Stopping([]), Sampler(True, [0] * rows, tiny.VOCAB))
    return Session(model, chooser, rows, 64, sources, tiny.VOCAB)


def random_tree(rng: random.Random, nodes: int, known: Draft, common: Sequence[int]) -> Draft:
    """A tree of TOKENS; now and then `known` with other nodes behind it, or the cached part `common` first."""
    if rng.random() < 0.3:
        tokens, parents = list(known.tokens), list(known.parents)
    else:
        tokens, parents = list(common), list(range(ROOT, len(common) - 1))
    chain = rng.random() < 0.3
    for _ in range(nodes):
        parents.append(len(tokens) - 1 if chain else rng.randrange(ROOT, len(tokens)))
        tokens.append(rng.choice(TOKENS))
    return Draft(tuple(tokens), tuple(parents), (0,) * len(tokens), (float("nan"),) * len(tokens))


@torch.no_grad()
def truth(session: Session, row: int, text: Text, draft: Draft) -> dict[int, Tensor]:
    """Per node (and ROOT) the logits after it."""
    model, logits = session.model, {}
    leaves = [node for node in range(-1, len(draft)) if not draft.children(node)]
    for leaf in leaves:
        path = draft.path(leaf)
        ids = torch.tensor([[*text.tokens, *(draft.tokens[node] for node in path)]])
        if model.config.is_encoder_decoder:
            inputs = {key: value[row : row + 1] for key, value in tiny.inputs_of("t5", session_rows(session)).items()}
            out = model(**inputs, decoder_input_ids=ids).logits[0]
        else:
            out = model(input_ids=ids).logits[0]
        for i, node in enumerate([ROOT, *path]):
            logits[node] = out[len(text) - 1 + i]
    return logits


def session_rows(session: Session) -> int:
    return len(session._readings)


@torch.no_grad()
def walk(session: Session, steps: int, seed: int, retire: bool = True) -> float:
    """The largest error of any logit that was asked for."""
    rng = random.Random(seed)
    rows = session_rows(session)
    lengths = [rng.choice((1, 4, 13, 19)) for _ in range(rows)]
    texts = [Text(torch.tensor([rng.randrange(3, tiny.VOCAB) for _ in range(length)])) for length in lengths]
    drafts = [Draft()] * rows
    live, worst = list(range(rows)), 0.0
    for _ in range(steps):
        if rng.random() < 0.1:
            session.forget()
        if retire and len(live) > 1 and rng.random() < 0.1:
            live.remove(rng.choice(live))
            session.retire(live)
        asked = [row for row in live if rng.random() < 0.8] or live[:1]
        requests = []
        for row in asked:
            draft, text = drafts[row], texts[row]
            tip = rng.randrange(ROOT, len(draft))
            grown = [draft.tokens[node] for node in draft.path(tip)]
            if rng.random() < 0.7:  # the text goes on as drafted for a while, then perhaps otherwise
                text.append(grown + [rng.choice(TOKENS)] * rng.choice((0, 1, 1, 2)))
                common = []
            else:
                common = grown
            new = random_tree(rng, rng.randrange(7), draft if common else Draft(), common)
            nodes = list(range(ROOT, len(new)))
            after = () if rng.random() < 0.5 else sorted(rng.sample(nodes, rng.randint(1, len(nodes))))
            requests.append(Request(row, text, new, after))
            drafts[row] = new
        if rng.random() < 0.2:
            worst = max(worst, rolled_error(session, requests, rng))
        for request, scores in zip(requests, session.score(requests), strict=True):
            right = truth(session, request.row, request.text, request.draft)
            for node in request.after:
                worst = max(worst, float((scores.raw(node) - right[node]).abs().max()))
                assert scores.choice(node) == int(scores.raw(node).argmax())
    return worst


def rolled_error(session: Session, requests: Sequence[Request], rng: random.Random) -> float:
    """How far below the truth's best logit any token is that a roll from some node of each draft draws."""
    tips = [rng.randrange(ROOT, len(request.draft)) for request in requests]
    drafts = [request.draft.only(request.draft.path(tip)) for request, tip in zip(requests, tips, strict=True)]
    contexts = [
        Context(request.row, request.text, None, draft) for request, draft in zip(requests, drafts, strict=True)
    ]
    steps, worst = [rng.randrange(5) for _ in requests], 0.0
    for context, wanted, rolled in zip(contexts, steps, draft_chain(session, contexts, steps), strict=True):
        assert len(rolled.tokens) == wanted
        draft = context.draft.extend(rolled.tokens, 0)
        right = truth(session, context.row, context.text, draft)
        for node in range(len(context.draft), len(draft)):
            above = right[draft.parents[node]]
            worst = max(worst, float(above.max() - above[draft.tokens[node]]))
    return worst


def balanced(session: Session) -> bool:
    """Law 5: tokens fed = tokens kept + rolled back, but for those that came with the user's cache."""
    return session.use.fed == session.kept + session.use.rolled_back - session.imported
