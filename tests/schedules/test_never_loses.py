"""The default on simulated devices: never behind plain decoding, nor behind the best fixed length in hindsight.

A device has a clock of its own, a slow first forward, slow first forwards of each shape, outliers and a neighbour.
"""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import pytest

from csdraft.decoding.draft import Draft
from csdraft.decoding.inputs import Shape
from csdraft.decoding.interfaces import Budget, Context, Round, Schedule, Verdict
from csdraft.schedules._plans import Group, Plan, plans_by_depth, reason
from csdraft.schedules._prices import Prices
from csdraft.schedules.cost_model import CostModel
from csdraft.schedules.fixed import Fixed
from csdraft.tables.costs import Costs, Way, Widths
from tests.schedules.world import Device, Stages, World, Writer

TOKENS, SEEDS, CALLS = 64, 8, 3


def copier(*kinds: tuple[float, float]) -> Writer:
    """Like Max-Gram: how often there is a match of each length, and how often its tokens are kept."""
    return Writer(0.003, 0.0, depth=10, neural=False, kinds=kinds)


DRAFTERS = {
    "copies": copier((0.25, 0.25), (0.15, 0.45), (0.12, 0.65), (0.08, 0.9)),
    "bad copies": copier((0.3, 0.1), (0.1, 0.2), (0.03, 0.3)),
    "good copies": copier((0.2, 0.4), (0.2, 0.6), (0.2, 0.85), (0.3, 0.95)),
    "good model": Writer(0.15, 0.8),
    "fair model": Writer(0.15, 0.6),
    "bad model": Writer(0.15, 0.3),
    "cascade": Stages((Writer(0.2, 0.65), Writer(0.003, 0.5, offers=0.5, depth=10, neural=False)), (5, 15)),
}
DEVICES = {
    "widths nearly free": {"wide": 0.01},
    "a jump from one query to two": {"wide": 0.04, "second": 0.4},
    "cold": {"wide": 0.01, "cold": 20.0, "new": 1.5},
    "outliers": {"wide": 0.02, "second": 0.1, "jitter": 0.1, "outliers": 0.03},
    "a neighbour": {"wide": 0.02, "second": 0.1, "jitter": 0.1, "neighbour": 15.0},
}


@cache
def seconds(drafter: str, device: str, depth: int | None) -> list[float]:
    """Seconds of each call of a new drafter, summed over texts; depth None is the default schedule."""
    total = [0.0] * CALLS
    for seed in range(SEEDS):
        machine, own, target = Device(**DEVICES[device]), deepcopy(DRAFTERS[drafter]), None
        for call in range(CALLS):
            world = World(own, machine, prompt=100, seed=1000 * call + seed)
            target = world.call.target = target or world
            total[call] += world.decode(CostModel() if depth is None else Fixed(depth), TOKENS)
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_default_keeps_up_with_the_best_fixed_length(drafter, device):
    mine = seconds(drafter, device, None)
    plain = seconds(drafter, device, 0)
    fixed = [seconds(drafter, device, depth) for depth in (0, 2, 5, 12)]
    first, later = [sum(times[:1]) for times in fixed], [sum(times[1:]) for times in fixed]
    assert mine[0] < min(first) / 0.89, "a first call pays for what it tries"
    assert sum(mine[1:]) < min(later) / 0.93
    assert mine[0] < plain[0] / 0.92
    assert sum(mine[1:]) < sum(plain[1:]) / 0.97


def test_taken_together_the_default_loses_nothing():
    """For some texts and devices a fixed length is better, but over all of them the default beats each length."""
    pairs = [(drafter, device) for drafter in DRAFTERS for device in DEVICES]
    for depth in (0, 2, 5, 12):
        shares = [sum(seconds(*pair, depth)) / sum(seconds(*pair, None)) for pair in pairs]
        assert sum(shares) / len(shares) > 1.05, depth


@pytest.mark.parametrize("cold", [1.0, 10.0, 100.0])
def test_a_copy_is_tried_from_the_first_round_on_however_cold(cold):
    world = World(copier((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1.0, 0.95)), Device(cold=cold, new=3.0))
    world.decode(CostModel(), 48)
    assert world.depths[0] > 1
    assert sum(depth == 0 for depth in world.depths[:-1]) <= 1, world.depths


def test_a_model_that_starts_badly_is_tried_again_soon():
    world = World(Writer(0.1, 0.9), Device(cold=30.0, new=2.0))
    world.luck[100:112] = [(0.0, 1.0, 0.0)] * 12  # no drafted token is kept there
    world.decode(CostModel(), 96)
    assert sum(world.depths[-10:]) > 20, world.depths


@dataclass(frozen=True)
class FixedSize(Schedule):
    """Trees of one size and depth."""

    depth: int
    size: int

    def budgets(self, contexts, rooms, drafter):
        return [Budget(min(self.depth, room), room, size=self.size) for room in rooms]


@pytest.mark.parametrize(("wide", "size"), [(0.001, 32), (0.12, 8)])
def test_the_size_of_a_tree_is_chosen_by_its_price(wide, size):
    """The largest if width is free, a small one if it is expensive; never far behind the best size in hindsight."""

    def decode(schedule, seed, drafter) -> World:
        world = World(drafter, Device(wide=wide), seed=seed)
        world.decode(schedule, 192)
        return world

    make = partial(Writer, 0.05, 0.6, depth=6, trees=(32, 16, 8))
    chosen = [decode(CostModel(), seed, make()) for seed in range(4)]
    later = [sizes for world in chosen for sizes in world.sizes[len(world.sizes) // 2 :] if sizes]
    assert Counter(later).most_common(1)[0][0] == size, Counter(later)
    best = min(
        sum(decode(FixedSize(depth, nodes), seed, make()).seconds for seed in range(4))
        for depth in (1, 2, 4, 6)
        for nodes in (32, 16, 8)
    )
    assert sum(world.seconds for world in chosen) < best / 0.87


class TellingOfSmallTrees(Writer):
    """Predicts what its small trees are worth, and cannot tell about large ones."""

    def expected(self, context, depth, size):
        return (0.01, size) if size < 16 else None


def test_a_drafter_may_predict_the_yield_of_some_sizes_only():
    """Found with such a drafter: a trial of the large tree also set a pause for the small one, which has none."""
    world = World(TellingOfSmallTrees(0.5, 0.0, depth=6, trees=(16, 8)))
    world.decode(CostModel(), 64)
    assert sum(depth == 0 for depth in world.depths) > len(world.depths) / 2


# Plans.


def test_plans_add_up_tokens_and_seconds():
    """One row, a sure first token and a likely second; two seconds a forward, and half a second a drafted token."""
    prices = Prices(World(Writer(0.5, 0.9)).call, [(Writer(0.5, 0.9), 5)], Costs())
    for width in (1, 2, 3):
        prices.forwards.add(width, 2.0)
    prices.plain, prices.token = 2.0, [0.5]
    one, two = plans_by_depth(Way(0), (1, 2), [Group(1, [1.0, 0.5], [1.0, 0.25])], prices, reading=0.1)
    assert (one.depth, one.width, one.tokens, one.seconds) == (1, 2, 2.0, pytest.approx(2.5 + 0.2))
    assert (two.depth, two.width, two.tokens) == (2, 3, 2.5)
    assert two.seconds == pytest.approx(2.5 + 0.5 / 4 + 0.25), "a quarter of the drafts is long enough to cost more"
    rows = [Group(1, [1.0], [1.0]), Group(3, [0.0], [1.0])]
    (mixed,) = plans_by_depth(Way(0), (1,), rows, prices, reading=0.0)
    assert mixed.tokens == 1.25, "one row of four keeps its token"


# Prices.


def test_a_cold_run_bounds_a_price_and_never_raises_it():
    widths = Widths()
    widths.add(1, 1.0)
    widths.add(1, 1.0)
    widths.add(6, 30.0, warm=False)
    assert widths.seconds(6) < 1.4
    widths.add(11, 1.05, warm=False)
    assert widths.seconds(6) <= 1.05


def test_an_outlier_is_measured_again_before_it_is_believed():
    widths = Widths()
    for width, time in ((1, 1.0), (1, 1.0), (5, 9.0)):
        widths.add(width, time)
    assert widths.seconds(5) < 1.5
    widths.add(5, 9.0)
    assert widths.seconds(5) == 9.0
    widths.add(5, 1.2)
    assert widths.seconds(5) == pytest.approx(1.2)


def test_an_unknown_shape_costs_about_what_the_nearest_does():
    costs = Costs()
    assert costs.widths(1, 100).seconds(5) < 1.1 * costs.widths(1, 100).seconds(1), "in steps: nothing is known"
    for width, time in ((1, 1.0), (1, 1.0), (5, 3.0), (5, 3.0)):
        costs.add(1, width, 100, time, warm=True)
    assert 3.0 < costs.widths(1, 100).seconds(7) < 3.2
    assert costs.widths(1, 5000).seconds(5) == 3.0
    for _ in range(2):
        costs.add(1, 1, 5000, 2.0, warm=True)
    assert costs.widths(1, 5000).seconds(5) == pytest.approx(6.0), (
        "as much more expensive as the widths that both have measured"
    )


def test_prompts_of_any_length_leave_few_prices():
    costs = Costs()
    for queries in range(1, 2000):
        costs.add(1, queries, 100, 1.0 + 0.01 * queries, warm=queries % 2 == 0)
    (widths,) = costs.groups.values()
    assert len(widths.centres.keys() | widths.bounds.keys()) == 64 + 4, "up to 64, then 64, 128, 256, 512 and 1,024"
    assert widths.bounds[512] == 1.0 + 0.01 * 513, "a price is an upper bound: a longer prompt's is"


def test_a_choice_holds_longer_the_more_was_learned():
    world = World(Writer(cost=0.01, accepted=0.9, neural=False))
    run = CostModel().start(world.call, world.drafter)
    compared: list[int] = []
    choose, run._choose = run._choose, lambda *args: compared.append(run.rounds) or choose(*args)
    for _ in range(40):
        context = Context(0, world.text, world.call)
        run.budgets([context], [100], world.drafter)
        world.shape, world.warm = Shape(1, 1, 200), True
        run.observe([Round(context, Draft.chain([]), Verdict([], 0, False), 0, None)], 0.0, 1.0)
    gaps = [later - earlier for earlier, later in pairwise(compared)]
    assert gaps[:6] == [1] * 6
    assert gaps == sorted(gaps)
    assert gaps[-1] == 4


def test_prices_do_not_fall_with_width():
    widths = Widths()
    for width, time in ((1, 1.0), (2, 1.5), (4, 1.2), (9, 2.0)):
        widths.add(width, time)
        widths.add(width, time)
    found = [widths.seconds(width) for width in range(1, 12)]
    assert found == sorted(found)
    assert widths.seconds(2) == 1.2


# Memory.


def test_the_memory_is_the_drafters_own_by_target():
    one, equal = Writer(0.4, 0.0), Writer(0.4, 0.0)
    world = World(one)
    world.decode(CostModel(), 64)
    assert [target for target, *_ in one.memory.entries()] == [world]
    assert not equal.memory.entries()
    other = World(one, seed=2)
    other.decode(CostModel(), 64)
    assert len(one.memory.entries()) == 2
    assert not deepcopy(one).memory.entries()
    assert not pickle.loads(pickle.dumps(one)).memory.entries()


def test_two_threads_may_use_one_drafter():
    drafter, target = Writer(0.1, 0.8), World(Writer(0.1, 0.8))

    def decode(seed: int) -> float:
        world = World(drafter, seed=seed)
        world.call.target = target
        return world.decode(CostModel(), 200)

    with ThreadPoolExecutor(2) as pool:
        assert all(time > 0 for time in pool.map(decode, range(8)))
    assert len(drafter.memory.entries()) == 1


# Reasons.


def test_the_reason_is_one_sentence():
    plans = [Plan(Way(0), 4, 2.6, 1.15), Plan(Way(0), 6, 2.9, 1.2), Plan(Way(0), 8, 3.0, 1.4)]
    assert reason(plans, 1.0) == (
        "drafts of 6 pay: 2.9 tokens per step at the cost of 1.2 steps; drafts of 8 would give 3.0 tokens per step at "
        "the cost of 1.4 steps"
    )
    assert reason([Plan(Way(1), 4, 2.6, 1.15)], 1.0).startswith("drafts of 4 without the first stage pay")
    assert reason([Plan(Way(2), 4, 2.6, 1.15)], 1.0).startswith("drafts of 4 without the first 2 stages pay")
    assert reason([Plan(Way(0), 2, 1.1, 1.5)], 1.0) == (
        "drafting does not pay: drafts of 2 would give 1.1 tokens per step at the cost of 1.5 steps"
    )
