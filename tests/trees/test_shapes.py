"""What trees keep of candidates that can be written down: hand-worked examples, and brute force."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import product
from math import log, prod

import pytest
import torch

from csdraft import spec
from csdraft.decoding.children import Children, _drawn
from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Tree
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.tree import Growth
from csdraft.drafters.model import ModelDrafter
from csdraft.reports.report import Report
from csdraft.reports.tally import Tally, counted
from csdraft.stored import fit
from csdraft.trees.best_first import BestFirst
from csdraft.trees.gsd import Gsd
from csdraft.trees.lead import Lead
from csdraft.trees.opt_tree import OptTree
from csdraft.trees.recursive import Recursive
from csdraft.trees.sequoia import Sequoia, best_shape
from csdraft.trees.stochastic_beam import StochasticBeam
from csdraft.trees.template import Template

Path = tuple[int, ...]
PROBS = (0.5, 0.3, 0.15, 0.05)


def probs_of(path: Path) -> tuple[float, ...]:
    """Of the token after `path`: the same numbers, for other tokens each time."""
    turn = sum(path) % 4
    return PROBS[turn:] + PROBS[:turn]


def worth(path: Path) -> float:
    return prod(probs_of(path[:i])[token] for i, token in enumerate(path))


def grown(tree: Tree, depth: int, probs=probs_of, sampler: Sampler | None = None) -> tuple[Growth, list[int], int]:
    """The candidates, the nodes kept, and the number of steps."""
    growth, steps, taken = Growth(), None, 0
    steps = tree.grow(growth, depth)
    try:
        step = next(steps)
        while True:
            taken += 1
            growth.add(
                step.nodes, [children(tree, probs(path_to(growth, n)), step.width, sampler) for n in step.nodes]
            )
            step = next(steps)
    except StopIteration as end:
        return growth, list(end.value), taken


def children(tree: Tree, probs: tuple[float, ...], width: int, sampler: Sampler | None) -> Children:
    if sampler is not None:
        assert tree.draws is not None
        return _drawn(0, sampler, torch.tensor(probs).log(), width, tree.draws)
    best = sorted(range(len(probs)), key=lambda token: (-probs[token], token))[:width]
    return Children([t for t in best if probs[t] > 0], [log(probs[t]) for t in best if probs[t] > 0])


def path_to(growth: Growth, node: int) -> Path:
    path: Path = ()
    while node != ROOT:
        path, node = (growth.tokens[node], *path), growth.parents[node]
    return path


def kept_paths(tree: Tree, depth: int, **how) -> set[Path]:
    growth, kept, _ = grown(tree, depth, **how)
    return {path_to(growth, node) for node in kept}


ALL = [path for length in (1, 2, 3) for path in product(range(4), repeat=length)]


@pytest.mark.parametrize("nodes", [1, 2, 5, 9, 20])
def test_opt_tree_has_the_likeliest_nodes_of_all(nodes: int) -> None:
    best = sorted((worth(path) for path in ALL), reverse=True)[:nodes]
    found = kept_paths(OptTree(nodes, threshold=0.0), 3)
    assert sorted(map(worth, found), reverse=True) == pytest.approx(best)
    assert len(found) == nodes


def test_opt_tree_stops_where_a_level_adds_too_little() -> None:
    half = lambda path: (0.5, 0.5)  # noqa: E731 - a level of 2^d nodes of worth 2^-d adds 1 while it fits
    nodes, gains = 6, []
    for depth in range(1, 5):
        best = sorted((0.5 ** len(p) for n in range(1, depth + 1) for p in product(range(2), repeat=n)), reverse=True)
        gains.append(sum(best[:nodes]))
    assert gains == [1.0, 2.0, 2.0, 2.0]
    assert grown(OptTree(nodes, threshold=0.0), 4, half)[2] == 3
    assert grown(OptTree(nodes, threshold=0.99), 4, half)[2] == 3
    assert grown(OptTree(nodes, threshold=1.0), 4, half)[2] == 1


def test_best_first_expands_few_and_keeps_the_likeliest() -> None:
    growth, kept, steps = grown(BestFirst(branches=2, nodes=6), 3)
    assert steps == 3
    assert Counter(growth.parents).keys() - {ROOT} <= set(range(len(growth)))
    assert max(Counter(growth.depths).values()) == 4  # 2 branches of 2 children
    left = sorted((growth.paths[n] for n in range(len(growth))), reverse=True)[:6]
    assert sorted((growth.paths[n] for n in kept), reverse=True) == left


def test_template_keeps_the_ranks_it_names() -> None:
    tree = Template(((0, 0), (0, 2), (1, 1, 0), (3,)))
    first = [0, 1, 2, 3]  # at the root tokens come by rank
    ranks = {path: sorted(range(4), key=lambda token: -probs_of(path)[token]) for path in [(), *ALL]}
    assert first == ranks[()]
    wanted = {(0,), (0, ranks[0,][0]), (0, ranks[0,][2]), (1,), (1, ranks[1,][1]), (3,)}
    second = (1, ranks[1,][1])
    assert kept_paths(tree, 3) == wanted | {(*second, ranks[second][0])}
    assert kept_paths(tree, 2) == wanted
    assert [tree.width(depth) for depth in (0, 1, 2, 3, 4)] == [0, 3, 6, 7, 7]


def test_only_the_lead_has_children() -> None:
    growth, kept, steps = grown(Lead(children=3), 3)
    assert (len(kept), steps) == (9, 3)
    assert set(growth.parents) == {ROOT, 0, 3}
    assert [growth.ranks[node] for node in set(growth.parents) - {ROOT}] == [0, 0]


# Sequoia.


def forests(nodes: int, depth: int, ranks: int) -> list[tuple]:
    """All tuples of children, elder ones first, of so many nodes in all; a child is the tuple of its own."""

    @cache
    def below(count: int, levels: int, most: int) -> list[tuple]:
        if not count or not levels or not most:
            return [()] if not count else []
        return [
            (first, *others)
            for own in range(1, count + 1)
            for first in below(own - 1, levels - 1, ranks)
            for others in below(count - own, levels, most - 1)
        ]

    return below(nodes, depth, ranks)


def value(forest: tuple, acceptance: tuple[float, ...]) -> float:
    return sum(acceptance[rank] * (1 + value(child, acceptance)) for rank, child in enumerate(forest))


@pytest.mark.parametrize("acceptance", [(0.6, 0.2, 0.1), (0.2, 0.5, 0.1), (0.9, 0.05), (0.0, 0.7), (0.4,)])
@pytest.mark.parametrize(("nodes", "depth"), [(1, 3), (4, 2), (6, 3), (7, 5)])
def test_sequoia_finds_the_best_shape(nodes: int, depth: int, acceptance: tuple[float, ...]) -> None:
    every = [forest for count in range(nodes + 1) for forest in forests(count, depth, len(acceptance))]
    best = max(value(forest, acceptance) for forest in every)
    shape = best_shape(nodes, depth, acceptance)
    assert len(set(shape)) == len(shape) <= nodes
    assert all(path[:-1] in ((), *shape) and len(path) <= depth for path in shape)
    assert all((*path[:-1], path[-1] - 1) in shape for path in shape if path[-1])
    assert sum(prod(acceptance[rank] for rank in path) for path in shape) == pytest.approx(best)


def test_sequoia_measures_the_acceptance_of_each_rank() -> None:
    report = Report()
    ranks = {(1, 0): 10, (1, -1): 10, (2, 0): 20, (2, 1): 6, (2, -1): 4, (3, 0): 40, (3, 2): 5, (3, -1): 5}
    report.reviews["target"] = Tally(ranks=Counter(ranks))
    tree = Sequoia.measured(report, nodes=7)
    assert tree.acceptance == pytest.approx((70 / 100, 6 / 80, 5 / 50))
    assert tree.nodes == 7
    assert fit(report.reviews["target"].to_dict(), Tally, "tally", counted).ranks == ranks
    report.reviews["target"] = Tally()
    with pytest.raises(ValueError, match="measure with a tree"):
        Sequoia.measured(report)


# Draws.


def shares(tree: Tree, depth: int, times: int, what) -> Counter:
    sampler = Sampler(False, [7], 3, "independent")
    found: Counter = Counter()
    for _ in range(times):
        growth, kept, _ = grown(tree, depth, lambda path: ((0.6, 0.3, 0.1), (0.2, 0.2, 0.6))[sum(path) % 2], sampler)
        found[what(growth, kept)] += 1
    return found


def chi_square(found: Counter, exact: dict, times: int) -> float:
    assert found.keys() <= exact.keys()
    return sum((found[key] - times * p) ** 2 / (times * p) for key, p in exact.items()) / (len(exact) - 1)


def test_recursive_draws_pairs_without_replacement() -> None:
    found = shares(Recursive((2,)), 1, 1000, lambda growth, kept: tuple(growth.tokens[node] for node in kept))
    q = (0.6, 0.3, 0.1)
    assert (
        chi_square(found, {(a, b): q[a] * q[b] / (1 - q[a]) for a in range(3) for b in range(3) if a != b}, 1000) < 3
    )


def test_a_stochastic_beam_draws_branches_without_replacement() -> None:
    """As if all nine branches of two tokens had been perturbed: Kool, van Hoof and Welling, arXiv 1903.06059."""
    distributions = (0.6, 0.3, 0.1), (0.2, 0.2, 0.6)
    leaves = {(a, b): distributions[0][a] * distributions[a % 2][b] for a in range(3) for b in range(3)}
    exact: dict = defaultdict(float)
    for (first, p), (second, q) in product(leaves.items(), repeat=2):
        if first != second:
            exact[frozenset((first, second))] += p * q / (1 - p)

    def drawn(growth: Growth, kept: list[int]) -> frozenset:
        return frozenset(path_to(growth, node) for node in kept if growth.depths[node] == 1)

    assert chi_square(shares(StochasticBeam(2), 2, 1500, drawn), exact, 1500) < 1.6  # 35 degrees: 0.02 of all seeds


# GSD.


def test_gsd_borrows_what_another_branch_has_drafted() -> None:
    """0 1 2 3 and 1 2 3 are likely: 1 2 below the root is said already, and what follows is borrowed from there."""
    after = {(): {0: 0.6, 1: 0.4}, (0,): {1: 0.9}, (1,): {2: 0.9}, (0, 1): {2: 0.9}, (1, 2): {4: 0.8}}
    after |= {(0, 1, 2): {3: 0.9}, (0, 1, 2, 3): {4: 0.9}}
    asked = []

    def distribution(path: Path) -> tuple[float, ...]:
        asked.append(path)
        return tuple(after.get(path, {4: 1.0}).get(token, 0.0) for token in range(5))

    growth, kept, _ = grown(Gsd(branches=2, nodes=20, least=0.0), 4, distribution)
    paths = {path_to(growth, node) for node in kept}
    assert (0, 1, 2) not in asked, "1 2 below 0 is 1 2 below the root, and is read once"
    assert {(1, 2, 4), (0, 1, 2, 4)} <= paths
    copy = next(node for node in kept if path_to(growth, node) == (0, 1, 2, 4))
    assert growth.paths[copy] == pytest.approx(log(0.6 * 0.9 * 0.9 * 0.8))
    assert len(paths) == len(kept)
    apart = {
        path_to(growth, node)
        for growth, kept, _ in [grown(Gsd(branches=2, context=9), 4, distribution)]
        for node in kept
    }
    assert (0, 1, 2, 3) in apart


def test_gsd_keeps_to_its_caps() -> None:
    def twins(path: Path) -> tuple[float, ...]:
        return (0.5, 0.5)

    growth, kept, _ = grown(Gsd(branches=2, nodes=9, context=0), 5, twins)
    assert len(kept) == 9
    assert max(growth.depths[node] for node in kept) < 5
    assert all(growth.parents[node] in (ROOT, *kept) for node in kept)
    assert len(grown(Gsd(branches=4, sibling_share=0.5), 1)[1]) == 2  # 0.5 and 0.3; 0.15 is less than half of 0.5
    growth, kept, _ = grown(Gsd(branches=4, least=0.4), 2)
    assert {growth.parents[node] for node in kept} == {ROOT, 0}  # the others are drafted, and have no children


# All of them.


@pytest.mark.parametrize("type_", spec.types("trees"))
def test_a_tree_is_no_wider_than_it_says(type_: str) -> None:
    tree = spec.find("trees", type_)()
    sampler = Sampler(False, [1], 4, "independent") if tree.draws is not None else None
    for depth in (1, 2, 4):
        for how in ({}, {"sampler": sampler}):
            growth, kept, _ = grown(tree, depth, **how)
            assert 0 < len(kept) <= tree.width(depth)
            assert max(growth.depths[node] for node in kept) < depth
    assert tree.width(0) == 0


@pytest.mark.parametrize(
    ("type_", "options"),
    [
        ("template", {"paths": [[]]}),
        ("template", {"paths": [[0, -1]]}),
        ("opt_tree", {"nodes": 0}),
        ("opt_tree", {"threshold": -0.1}),
        ("sampled", {"branching": (2, 0)}),
        ("pairs", {"branching": (3,)}),
        ("stochastic_beam", {"beams": 0}),
        ("sequoia", {"nodes": 0}),
        ("sequoia", {"acceptance": (0.7, 0.6)}),
        ("lead", {"children": 0}),
        ("gsd", {"least": 2.0}),
        ("gsd", {"context": -1}),
    ],
)
def test_an_option_out_of_range_is_named(type_: str, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        spec.find("trees", type_)(**options)


def test_a_tree_is_an_object() -> None:
    with pytest.raises(ValueError, match=r"tree='best_first' of a ModelDrafter is a str; give an object"):
        ModelDrafter(torch.nn.Linear(1, 1), tree="best_first")  # type: ignore[arg-type]


def test_shapes_come_through_json() -> None:
    tree = Template(((0, 0), (1,)))
    assert spec.from_json("trees", spec.to_json(tree, spec.Names({}, {}))) == tree
