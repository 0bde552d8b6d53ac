"""Trees grown on tables of distributions, without a model: by enumeration of every draw, or with a real sampler."""

from __future__ import annotations

import torch

from csdraft import spec
from csdraft.decoding.children import Children, _drawn, _likeliest
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context, Tree
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.tree import Growth, Row, _draft
from tests.verifiers.toy import Branching, Model, Place, Propose
from tests.verifiers.trees import siblings

TREES = spec.types("trees")
SMALL = {
    "sampled": {"branching": (2, 1)},
    "recursive": {"branching": (2, 2)},
    "pairs": {"branching": (2, 2)},
    "sequoia": {"nodes": 5, "acceptance": (0.5, 0.2)},
    "stochastic_beam": {"beams": 2},
}
"""Options of the trees that draw, few enough nodes to enumerate every draw."""


def small(type: str) -> Tree:
    tree = spec.find("trees", type)(**SMALL.get(type, {}))
    assert tree.draws is None or type in SMALL, f"say in SMALL how to make a {type} tree of a few nodes"
    return tree


def grown(tree: Tree, drafter: Model, place: Place, sampler: Branching | Sampler | None, depth: int = 2) -> Draft:
    """The draft of one row, as the driver would grow it with a model."""
    row = Row(Context(0, place.text, None, place.draft), tree, min(depth, place.depth))  # type: ignore[arg-type]
    growth, steps = row.growth, row.steps
    try:
        step = next(steps)
        while True:
            nodes = sorted(step.nodes)
            distributions = [drafter.probs(place.text + branch(growth, node)) for node in nodes]
            if sampler is None or tree.draws is None:
                above = [growth.path(node) for node in nodes]
                growth.add(nodes, _likeliest(torch.stack(distributions).log(), [step], [above])[0])
            else:
                assert step.most is None
                growth.add(
                    nodes, [children(tree, distribution, step.width, sampler) for distribution in distributions]
                )
            step = next(steps)
    except StopIteration as end:
        row.kept = end.value
    return _draft(row, 2, False)


def branch(growth: Growth, node: int) -> tuple[int, ...]:
    """Token ids down to a candidate."""
    tokens: list[int] = []
    while node != ROOT:
        tokens.append(growth.tokens[node])
        node = growth.parents[node]
    return tuple(tokens[::-1])


def children(tree: Tree, distribution: torch.Tensor, width: int, sampler: Branching | Sampler) -> Children:
    """Draws of one node."""
    assert tree.draws is not None
    if isinstance(sampler, Sampler):
        return _drawn(0, sampler, distribution.log(), width, tree.draws)
    possible = int((distribution > 0).sum())
    count = width if tree.draws == "iid" else min(width, possible)
    tokens = siblings(distribution, tree.draws, count, sampler)[:count]
    return Children(tokens, distribution[tokens].log().tolist(), probs=distribution)


def proposing(tree: Tree, drafter: Model, real: Sampler | None = None) -> Propose:
    """A toy drafter; with a `real` sampler its draws are those of a call, else all there are."""
    return lambda place, sampler: grown(tree, drafter, place, real or sampler)
