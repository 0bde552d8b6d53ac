"""Toy drafters of trees, one for every way in which siblings come about: see `DraftProbs.kind`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT
from tests.verifiers.toy import Branching, Model, Place, Propose, planted

Node = tuple[int, int, Tensor | None]


def siblings(distribution: Tensor, kind: str, count: int, sampler: Branching) -> list[int]:
    """Tokens drawn from `distribution`; fewer than `count` where the kind has no more."""
    if kind == "iid":
        return [sampler.draw(0, distribution) for _ in range(count)]
    if kind == "pair":
        hub, first = int(distribution.argmax()), sampler.draw(0, distribution)
        return [first, sampler.draw(0, without(distribution, [first])) if first == hub else hub]
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(sampler.draw(0, without(distribution, tokens)))
    return tokens


def without(distribution: Tensor, tokens: Sequence[int]) -> Tensor:
    """(vocab,) weights of the tokens that are left; equal ones if the distribution has none left."""
    rest = distribution.clone()
    rest[list(tokens)] = 0
    if rest.sum() > 0:
        return rest
    rest = torch.ones_like(distribution)
    rest[list(tokens)] = 0
    return rest


def drawn_tree(drafter: Model, kind: str, counts: Sequence[int]) -> Propose:
    """`counts[0]` tokens below the root, then `counts[i]` below the i-th of them, as far as they are wanted."""

    def propose(place: Place, sampler: Branching) -> list:
        distribution = drafter.probs(place.text)
        first = siblings(distribution, kind, counts[0], sampler)
        nodes: list[Node] = [(token, ROOT, distribution) for token in first]
        if place.depth > 1:
            for parent, (token, count) in enumerate(zip(first, counts[1:], strict=False)):
                distribution = drafter.probs((*place.text, token))
                nodes += [
                    (child, parent, distribution) for child in siblings(distribution, kind, count, sampler) if count
                ]
        return planted(nodes, kind)

    return propose


def both_sorts(drafter: Model, kind: str, chosen_at: Sequence[int], count: int = 2) -> Propose:
    """Drawn siblings with chosen ones put among them, before the places `chosen_at`; a chosen child below the last."""

    def propose(place: Place, sampler: Branching) -> list:
        distribution = drafter.probs(place.text)
        nodes: list[Node] = [(token, ROOT, distribution) for token in siblings(distribution, kind, count, sampler)]
        for i, at in enumerate(chosen_at):
            nodes.insert(at, ((place.depth + i) % len(distribution), ROOT, None))
        nodes.append((0, len(nodes) - 1, None))
        return planted(nodes, kind)

    return propose


def lone_draws(drafter: Model, kind: str) -> Propose:
    """A drawn token beside two chosen ones, and a drawn child of the first two."""

    def propose(place: Place, sampler: Branching) -> list:
        distribution = drafter.probs(place.text)
        best = distribution.topk(2).indices.tolist()
        nodes: list[Node] = [
            (best[0], ROOT, None),
            (sampler.draw(0, distribution), ROOT, distribution),
            (best[1], ROOT, None),
        ]
        for parent in (0, 1):
            distribution = drafter.probs((*place.text, nodes[parent][0]))
            nodes.append((sampler.draw(0, distribution), parent, distribution))
        return planted(nodes, kind)

    return propose


def beam(drafter: Model, width: int) -> Propose:
    """Stochastic beam search of two levels: which branches go on is a race of all of them (arXiv 1903.06059).

    Sequences drawn without replacement arrive in the order of their perturbed scores. So do their first tokens, and
    from any moment on those that have not arrived yet do so with the odds that they have.
    """

    def propose(place: Place, sampler: Branching) -> list:
        distribution = drafter.probs(place.text)
        below = [drafter.probs((*place.text, token)) for token in range(len(distribution))]
        weights = torch.cat([distribution[token] * row for token, row in enumerate(below)])
        leaves: list[int] = []
        while len(leaves) < width and weights.sum() > 1e-12:
            leaves.append(sampler.draw(0, weights))
            weights[leaves[-1]] = 0
        first = list(dict.fromkeys(leaf // len(distribution) for leaf in leaves))
        while (
            len(first) < width and (rest := distribution.clone().index_fill_(0, torch.tensor(first), 0)).sum() > 1e-12
        ):
            first.append(sampler.draw(0, rest))
        nodes: list[Node] = [(token, ROOT, distribution) for token in first]
        if place.depth > 1:
            for leaf in leaves:
                token, child = divmod(leaf, len(distribution))
                nodes.append((child, first.index(token), below[token]))
        return planted(nodes, "without_replacement")

    return propose
