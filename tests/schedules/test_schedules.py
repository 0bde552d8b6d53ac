"""Every schedule keeps to its rooms; the cost model finds what pays and drops what does not."""

import pytest

from csdraft.schedules.cost_model import CostModel
from csdraft.schedules.fixed import Fixed
from csdraft.schedules.heuristic import Heuristic
from csdraft.spec import find, types
from csdraft.tables.costs import Widths
from tests.schedules.world import Device, Stages, World, Writer


def every_schedule():
    return [pytest.param(find("schedules", name), id=name) for name in types("schedules")]


def speedup(drafter, schedule, tokens=256, seeds=6, calls=1, **distributions):
    """Plain seconds over drafted seconds, summed over seeds (of the last of `calls` calls)."""
    total = {}
    for policy in (schedule, Fixed(0)):
        total[policy] = 0.0
        for seed in range(seeds):
            device, target = Device(**distributions), object
            drafter.memory.clear()
            for _ in range(calls):
                world = World(drafter, device, seed=seed)
                target = world.call.target = target if isinstance(target, World) else world
                seconds = world.decode(policy, tokens)
            total[policy] += seconds
    return total[Fixed(0)] / total[schedule]


def max_gram(accepted, offers):
    return Writer(0.002, accepted, offers=offers, depth=10, neural=False)


@pytest.mark.parametrize("schedule", every_schedule())
@pytest.mark.parametrize("accepted", [0.0, 0.5, 1.0])
def test_budgets_stay_within_rooms_and_the_text_ends_on_time(schedule, accepted):
    world = World(Writer(0.1, accepted), seed=1)
    world.decode(schedule(), 60)  # asserts 0 <= depth <= room every round
    assert len(world.text) == world.prompt + 60


@pytest.mark.parametrize("schedule", every_schedule())
def test_one_token_left_leaves_no_room(schedule):
    world = World(Writer(0.1, 0.9), seed=1)
    world.decode(schedule(), 1)
    assert world.depths == [0]


def test_heuristic_moves_as_transformers_does():
    world = World(Writer(0.1, 1.0, depth=20), seed=0)
    world.decode(Heuristic(depth=5), 60)
    assert world.depths[:4] == [5, 7, 9, 11]
    world = World(Writer(0.1, 0.0), seed=0)
    world.decode(Heuristic(depth=3), 20)
    assert world.depths[:5] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize("accepted", [0.4, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("cost", [0.05, 0.15, 0.4])
def test_cost_model_comes_close_to_the_best_fixed_depth(accepted, cost):
    drafter = Writer(cost, accepted)
    best = max(speedup(drafter, Fixed(depth)) for depth in (0, 1, 2, 3, 5, 8))
    assert speedup(drafter, CostModel(remember=False), jitter=0.1) > 0.93 * best


@pytest.mark.parametrize("cost", [0.05, 0.15])
def test_a_drafter_that_is_never_right_costs_little(cost):
    drafter = Writer(cost, 0.0)
    assert speedup(drafter, CostModel(remember=False), jitter=0.1) > 0.96
    # A schedule that keeps drafting would fail.
    assert speedup(drafter, Fixed(2)) < 0.9


def test_later_calls_know_better():
    drafter = Writer(0.4, 0.0)
    first = World(drafter)
    before = first.decode(CostModel(), 256)
    later = World(drafter, seed=2)
    later.call.target = first.call.target  # what is remembered is remembered of this target
    assert later.decode(CostModel(), 256) < before


@pytest.mark.parametrize(
    ("cost", "accepted", "offers", "copied"), [(0.45, 0.47, 0.6, 0.85), (0.15, 0.0, 0.5, 0.8), (0.15, 0.7, 0.5, 0.8)]
)
def test_an_expensive_stage_is_left_out_of_a_cascade(cost, accepted, offers, copied):
    neural, statistical = Writer(cost, accepted), max_gram(copied, offers)
    cascade = Stages((neural, statistical), (5, 15))
    alone = speedup(statistical, CostModel(remember=False), jitter=0.1)
    assert speedup(cascade, CostModel(remember=False), jitter=0.1) > 0.85 * alone


@pytest.mark.parametrize("prompt", [2, 12, 40, 400])
def test_a_cold_first_forward_or_a_short_prompt_does_not_price_drafts(prompt):
    """Found with a prompt of two tokens: one slow forward, taken for the cost of width 2, and nothing was drafted."""
    writer = max_gram(0.95, 0.9)
    for cold in (1.0, 50.0):
        world = World(writer, Device(cold=cold), prompt=prompt)
        world.decode(CostModel(remember=False), 96)
        assert sum(world.depths) > 96, (cold, world.depths)


def test_a_useless_tail_does_not_hide_a_good_drafter():
    neural, useless = Writer(0.15, 0.7), max_gram(0.0, 0.5)
    cascade = Stages((neural, useless), (5, 15))
    alone = max(speedup(neural, Fixed(depth)) for depth in (1, 2, 3, 4, 5))
    assert speedup(cascade, CostModel(remember=False), jitter=0.1) > 0.9 * alone


def test_widths_interpolate_and_extrapolate():
    widths = Widths()
    for _ in range(3):
        widths.add(1, 1.0)
        widths.add(5, 1.4)
    widths.add(5, 9.0)  # an outlier
    assert widths.seconds(1) == 1.0
    assert widths.seconds(3) == pytest.approx(1.2)
    assert 1.4 < widths.seconds(9) < 1.6, "after the nearest width that was measured"


@pytest.mark.parametrize(("cost", "accepted"), [(0.07, 0.5), (0.07, 0.6), (0.15, 0.6)])
def test_copies_that_are_never_found_do_not_delay_the_drafter_above(cost, accepted):
    """Found in first calls: a stage that had nothing to copy was asked again for ten rounds, without the one above."""
    neural = Writer(cost, accepted)
    cascade = Stages((neural, max_gram(0.9, 0.0)), (5, 15))
    alone, both = (
        sum(World(drafter, seed=seed).decode(CostModel(remember=False), 48) for seed in range(6))
        for drafter in (neural, cascade)
    )
    assert both < 1.06 * alone
