"""Toy drafters of trees, one for every way in which siblings come about: see `Law.kind`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT
from tests.verifiers.toy import Branching, Model, Place, Propose, planted

Node = tuple[int, int, Tensor | None]


def siblings(law: Tensor, kind: str, count: int, sampler: Branching) -> list[int]:
    """Tokens drawn from `law`; fewer than `count` where the kind has no more."""
    if kind == "iid":
        return [sampler.draw(0, law) for _ in range(count)]
    if kind == "pair":
        hub, first = int(law.argmax()), sampler.draw(0, law)
        return [first, sampler.draw(0, without(law, [first])) if first == hub else hub]
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(sampler.draw(0, without(law, tokens)))
    return tokens


def without(law: Tensor, tokens: Sequence[int]) -> Tensor:
    """(vocab,) weights of the tokens that are left; equal ones if the law has none left."""
    rest = law.clone()
    rest[list(tokens)] = 0
    if rest.sum() > 0:
        return rest
    rest = torch.ones_like(law)
    rest[list(tokens)] = 0
    return rest


def drawn_tree(drafter: Model, kind: str, counts: Sequence[int]) -> Propose:
    """`counts[0]` tokens below the root, then `counts[i]` below the i-th of them, as far as they are wanted."""

    def propose(place: Place, sampler: Branching) -> list:
        law = drafter.law(place.text)
        first = siblings(law, kind, counts[0], sampler)
        nodes: list[Node] = [(token, ROOT, law) for token in first]
        if place.depth > 1:
            for parent, (token, count) in enumerate(zip(first, counts[1:], strict=False)):
                law = drafter.law((*place.text, token))
                nodes += [(child, parent, law) for child in siblings(law, kind, count, sampler) if count]
        return planted(nodes, kind)

    return propose


def both_sorts(drafter: Model, kind: str, chosen_at: Sequence[int], count: int = 2) -> Propose:
    """Drawn siblings with chosen ones put among them, before the places `chosen_at`; a chosen child below the last."""

    def propose(place: Place, sampler: Branching) -> list:
        law = drafter.law(place.text)
        nodes: list[Node] = [(token, ROOT, law) for token in siblings(law, kind, count, sampler)]
        for i, at in enumerate(chosen_at):
            nodes.insert(at, ((place.depth + i) % len(law), ROOT, None))
        nodes.append((0, len(nodes) - 1, None))
        return planted(nodes, kind)

    return propose


def lone_draws(drafter: Model, kind: str) -> Propose:
    """A drawn token beside two chosen ones, and a drawn child of the first two."""

    def propose(place: Place, sampler: Branching) -> list:
        law = drafter.law(place.text)
        best = law.topk(2).indices.tolist()
        nodes: list[Node] = [(best[0], ROOT, None), (sampler.draw(0, law), ROOT, law), (best[1], ROOT, None)]
        for parent in (0, 1):
            law = drafter.law((*place.text, nodes[parent][0]))
            nodes.append((sampler.draw(0, law), parent, law))
        return planted(nodes, kind)

    return propose


def beam(drafter: Model, width: int) -> Propose:
    """Stochastic beam search of two levels: which branches go on is a race of all of them (arXiv 1903.06059).

    Sequences drawn without replacement arrive in the order of their perturbed scores. So do their first tokens, and
    from any moment on those that have not arrived yet do so with the odds that they have.
    """

    def propose(place: Place, sampler: Branching) -> list:
        law = drafter.law(place.text)
        below = [drafter.law((*place.text, token)) for token in range(len(law))]
        weights = torch.cat([law[token] * row for token, row in enumerate(below)])
        leaves: list[int] = []
        while len(leaves) < width and weights.sum() > 1e-12:
            leaves.append(sampler.draw(0, weights))
            weights[leaves[-1]] = 0
        first = list(dict.fromkeys(leaf // len(law) for leaf in leaves))
        while len(first) < width and (rest := law.clone().index_fill_(0, torch.tensor(first), 0)).sum() > 1e-12:
            first.append(sampler.draw(0, rest))
        nodes: list[Node] = [(token, ROOT, law) for token in first]
        if place.depth > 1:
            for leaf in leaves:
                token, child = divmod(leaf, len(law))
                nodes.append((child, first.index(token), below[token]))
        return planted(nodes, "without_replacement")

    return propose
