"""The randomness that verifiers build on: coupled noise is Gumbel-max, draws are draws, and all are independent.

Seeds are fixed, so these are checks of one long run each; a chi-square statistic is compared as a normal deviate.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from csdraft.decoding.sampling import Sampler

CPU = torch.device("cpu")
PROBS = torch.tensor([0.42, 0.23, 0.17, 0.11, 0.07])
POSITIONS = 12000
UNLIKELY = 4.0


def deviate(counts: dict, probs: dict) -> float:
    """Pearson's chi-square of `counts` against `probs` as a standard normal deviate (Wilson and Hilferty)."""
    total, freedom = sum(counts.values()), len(probs) - 1
    assert set(counts) <= set(probs)
    chi_square = sum((counts.get(key, 0) - total * prob) ** 2 / (total * prob) for key, prob in probs.items())
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def pairs(distribution: dict) -> dict:
    return {(a, b): distribution[a] * distribution[b] for a in distribution for b in distribution}


def choices(sampler: Sampler, row: int, probs: torch.Tensor = PROBS) -> list[int]:
    """The coupled draw at each of many positions."""
    log_probs = probs.log()
    return [int((log_probs - sampler.log_exponential(row, i, CPU)).argmax()) for i in range(POSITIONS)]


@pytest.fixture(scope="module")
def coupled() -> list[list[int]]:
    """Two rows whose seeds are neighbours."""
    sampler = Sampler(False, [11, 12], vocab=5)
    return [choices(sampler, row) for row in (0, 1)]


DISTRIBUTION = dict(enumerate(PROBS.tolist()))


def test_coupled_choices_have_the_distribution(coupled):
    for tokens in coupled:
        assert abs(deviate(Counter(tokens), DISTRIBUTION)) < UNLIKELY


@pytest.mark.parametrize("distance", [1, 2, 7])
def test_positions_are_independent(coupled, distance):
    for tokens in coupled:
        assert abs(deviate(Counter(zip(tokens, tokens[distance:], strict=False)), pairs(DISTRIBUTION))) < UNLIKELY


@pytest.mark.parametrize("distance", [0, 1])
def test_rows_are_independent(coupled, distance):
    first, second = coupled
    assert abs(deviate(Counter(zip(first, second[distance:], strict=False)), pairs(DISTRIBUTION))) < UNLIKELY


def test_the_level_uniform_is_uniform_and_independent_of_the_choice(coupled):
    sampler = Sampler(False, [11, 12], vocab=5)
    quarters = {level: [int(4 * sampler.level_uniform(0, i, level)) for i in range(POSITIONS)] for level in (0, 1)}
    quarter = dict.fromkeys(range(4), 0.25)
    assert abs(deviate(Counter(zip(quarters[0], quarters[1], strict=True)), pairs(quarter))) < UNLIKELY
    joint = {(a, b): DISTRIBUTION[a] / 4 for a in DISTRIBUTION for b in quarter}
    assert abs(deviate(Counter(zip(coupled[0], quarters[0], strict=True)), joint)) < UNLIKELY


def test_noise_does_not_depend_on_the_width_and_is_never_infinite():
    narrow, wide = Sampler(False, [3], vocab=5), Sampler(False, [3], vocab=50)
    for position in (0, 1, 999):
        noise = wide.log_exponential(0, position, CPU)
        assert torch.equal(narrow.log_exponential(0, position, CPU), noise[:5])
    huge = Sampler(False, [3], vocab=1 << 22).log_exponential(0, 0, CPU)
    assert huge.isfinite().all()
    assert abs(float(huge.double().exp().mean()) - 1) < 0.005  # exponential: mean 1


@pytest.mark.slow
def test_wide_vocabularies_have_the_distribution_too():
    probs = torch.cat([PROBS / 2, torch.full((45,), 0.5 / 45)])
    tokens = choices(Sampler(False, [4], vocab=50), 0, probs)
    assert abs(deviate(Counter(tokens), dict(enumerate(probs.tolist())))) < UNLIKELY


def test_fresh_draws_and_trials_have_their_distributions_and_are_independent():
    sampler = Sampler(False, [5, 6], vocab=5, draws="independent")
    drawn = [(sampler.draw(0, 3 * PROBS), sampler.accepts(0, 0.3)) for _ in range(POSITIONS)]
    joint = {
        (token, kept): DISTRIBUTION[token] * (0.3 if kept else 0.7) for token in DISTRIBUTION for kept in (False, True)
    }
    assert abs(deviate(Counter(drawn), joint)) < UNLIKELY
    tokens = [token for token, _ in drawn]
    assert abs(deviate(Counter(pairwise(tokens)), pairs(DISTRIBUTION))) < UNLIKELY
    other = [(sampler.draw(1, PROBS), sampler.accepts(1, 0.3)) for _ in range(POSITIONS)]
    assert (
        abs(deviate(Counter(zip(tokens, [token for token, _ in other], strict=True)), pairs(DISTRIBUTION))) < UNLIKELY
    )


def test_certain_trials_are_certain_and_impossible_tokens_never_drawn():
    sampler = Sampler(False, [7], vocab=3, draws="independent")
    for probability in (1.0, 2.5, 0.0):
        assert {sampler.accepts(0, probability) for _ in range(2000)} == {probability > 0}
    assert {sampler.draw(0, torch.tensor([0.0, 0.5, 0.0])) for _ in range(200)} == {1}
