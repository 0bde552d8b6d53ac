"""The measurement of lookups: what it measures is there, and its claims can fail."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from benchmarks.lookup import CASES, lookup_claims, lookup_table, measure_lookups

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel


def test_every_case_is_measured_and_judged() -> None:
    phrases = [[random.Random(seed).randrange(90) for _ in range(9)] for seed in range(40)]
    tokens = [token for seed in range(150) for token in phrases[random.Random(seed).randrange(40)]]
    found = measure_lookups(tokens, 90, history=400, proposals=40)
    assert [one.drafter for one in found] == [case.name for case in CASES]
    for one in found:
        assert one.drafted > 1
        assert 0 < one.cpu_microseconds <= one.slow
        assert one.tokens >= (80 if math.isnan(one.rate) else 400)
        assert 7 < one.bytes < 1000
    lines = lookup_table(found).splitlines()
    assert len(lines) == 2 + len(found)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    slow = [replace(one, cpu_microseconds=51.0, rate=2e5) for one in found]
    assert len(lookup_claims(found)) == 2 * len(found) - 1  # nobody reads a text for token recycling
    assert not any(claim.passed for claim in lookup_claims(slow))
    fast = [replace(one, cpu_microseconds=49.0, rate=4e5) for one in found]
    assert all(claim.passed for claim in lookup_claims(fast))
    with pytest.raises(ValueError, match="1350 tokens are too few"):
        measure_lookups(tokens, 90, history=1000)
