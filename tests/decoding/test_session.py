"""A session answers right whatever it is asked in whatever order, and sees no token twice without saying so."""

from __future__ import annotations

import pytest

from csdraft.decoding import reader
from tests import tiny
from tests.decoding.walk import balanced, open_session, walk

CLOSE = 5e-4  # float32; a wrong mask or position is off by 0.05 or more (test_session_mutants.py)
CASES = [(family, attention) for family in tiny.FAMILIES for attention in tiny.attentions(family)]


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_random_walk_gives_the_logits_of_plain_forwards(
    family: str, attention: str, rows: int, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "LARGE_MASK", 0)  # these masks are small; the other tests compute them whole
    for seed in range(rows, rows + seeds):
        session = open_session(tiny.tiny(family, attention), rows)
        assert walk(session, 12, seed) < CLOSE
        assert balanced(session)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_drafts_deeper_than_the_window(family: str) -> None:
    for rows in (1, 3):
        session = open_session(tiny.narrow(family), rows)
        assert walk(session, 12, rows) < CLOSE
        assert balanced(session)
