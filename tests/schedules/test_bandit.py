"""The bandit learns to play what pays, drops what does not, and starts the next call from what it has learned."""

from __future__ import annotations

import pytest

from csdraft.schedules.bandit import Bandit
from csdraft.schedules.fixed import Fixed
from tests.schedules.world import Stages, World, Writer

SEEDS = range(5)
TAIL = Writer(0.002, 0.6, offers=0.6, depth=10, neural=False)


def speedup(drafter, schedule, tokens=512) -> float:
    """Plain seconds over drafted seconds, summed over seeds."""
    drafted = plain = 0.0
    for seed in SEEDS:
        world = World(drafter, seed=seed)
        drafted += world.decode(schedule, tokens)
        plain += World(drafter, seed=seed).decode(Fixed(0), tokens)
    return plain / drafted


def test_what_pays_is_played():
    good = Writer(0.1, 0.85)
    assert speedup(good, Bandit()) > 0.93 * max(speedup(good, Fixed(depth)) for depth in (2, 5, 10))


def test_what_does_not_pay_is_dropped():
    costly = Writer(0.9, 0.5)
    assert speedup(costly, Fixed(5)) < 0.5
    assert speedup(costly, Bandit()) > 0.8


def test_a_stage_that_does_not_pay_is_left_out():
    cascade = Stages((Writer(0.9, 0.4), TAIL), (5, 10))
    assert speedup(cascade, Fixed(5)) < 0.5
    assert speedup(cascade, Bandit()) > 1.15


def test_the_next_call_starts_from_what_the_last_one_learned():
    drafter = Writer(3.0, 0.1)
    model = World(drafter)
    drafted = {True: 0, False: 0}
    for remember in drafted:
        drafter.memory.clear()
        for seed in SEEDS:
            world = World(drafter, seed=seed)
            world.call.target = model  # the same one in all calls
            world.decode(Bandit(remember=remember), 64)
            drafted[remember] += sum(depth > 0 for depth in world.depths)
    assert drafted[True] < 0.7 * drafted[False], "an expensive drafter is rarely tried again"


def test_what_changes_is_noticed():
    """A drafter that turns bad is dropped, even if it was the best for a long time."""
    writer = Writer(0.1, 0.95)
    world = World(writer, seed=0)
    bandit = Bandit()
    world.decode(bandit, 600)
    assert sum(depth > 0 for depth in world.depths[-40:]) > 30
    before = len(world.depths)
    object.__setattr__(writer, "accepted", 0.0)
    world.decode(bandit, 300)
    assert sum(depth == 0 for depth in world.depths[before + 100 :]) > 0.7 * (len(world.depths) - before - 100)


@pytest.mark.parametrize("options", [{"depths": ()}, {"depths": (0,)}, {"exploration": -1}, {"memory": 1}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        Bandit(**options)
