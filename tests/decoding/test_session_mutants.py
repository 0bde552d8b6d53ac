"""Bugs put in on purpose, one at a time: the random walk of test_session.py must notice every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from csdraft.decoding import reader
from csdraft.decoding.cache import SlotCache
from csdraft.decoding.draft import Draft
from csdraft.decoding.reader import Reader
from csdraft.decoding.session import Session
from tests import tiny
from tests.decoding.walk import balanced, open_session, walk

NOTICED = 0.05


def flat_mask(patch: pytest.MonkeyPatch) -> None:
    """A draft's nodes see all earlier ones, other branches too."""
    plan = Session.plan

    def flat(self, request):
        made, queries = plan(self, request)
        if made.paths is not None:
            made = replace(made, paths=[()] * len(made.tokens), sees=[slot + 1 for slot in made.slots])
        return made, queries

    patch.setattr(Session, "plan", flat)


def no_move(patch: pytest.MonkeyPatch) -> None:
    """An accepted branch stays where it was."""
    patch.setattr(SlotCache, "move", lambda *_: None)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A draft stands one position too far on."""
    plan = Session.plan

    def shifted(self, request):
        made, queries = plan(self, request)
        return replace(made, positions=[p + (p >= len(request.text)) for p in made.positions]), queries

    patch.setattr(Session, "plan", shifted)


def no_rollback(patch: pytest.MonkeyPatch) -> None:
    """What was drafted counts as text, whatever the text says."""
    keep = Session._keep

    def trusting(self, row, reading, draft):
        if reading.used <= len(reading.text) and reading.draft.is_chain:
            reading.read, reading.draft = reading.used, Draft()
        return keep(self, row, reading, draft)

    patch.setattr(Session, "_keep", trusting)


def any_twin(patch: pytest.MonkeyPatch) -> None:
    """A cached node is reused for any token below the same parent."""
    child = Draft.child

    def first(self, node, token):
        found = child(self, node, token)
        return found if found is not None or not self.children(node) else self.children(node)[0]

    patch.setattr(Draft, "child", first)


def padding_over_cached_slots(patch: pytest.MonkeyPatch) -> None:
    """A short row's padding is written behind what is read instead of behind all that is cached."""
    plan = Session.plan

    def mutant(self, request):
        made, queries = plan(self, request)
        return replace(made, spare=made.slots[-1] + 1), queries

    patch.setattr(Session, "plan", mutant)


def window_by_slot(patch: pytest.MonkeyPatch) -> None:
    """A sliding window is measured in slots, not positions."""
    place = SlotCache.place
    patch.setattr(SlotCache, "place", lambda self, slots, positions, *more: place(self, slots, slots, *more))


def no_window(patch: pytest.MonkeyPatch) -> None:
    """A sliding window is forgotten."""
    patch.setattr(reader, "_spanned", lambda allowed, *spans: allowed)


def no_position_bias(patch: pytest.MonkeyPatch) -> None:
    """T5's bias goes by slot."""
    patch.setattr(Reader, "_position_bias", lambda self, positions, standing: torch.zeros(()))


def boolean_mask_for_eager(patch: pytest.MonkeyPatch) -> None:
    """Eager attention gets a boolean mask, which it adds."""
    patch.setattr(Reader, "_additive", lambda self, allowed: allowed)


def rows_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """After repacking, rows are taken for one another."""
    patch.setattr(SlotCache, "keep_rows", lambda self, rows: keep(self, rows[::-1]))


keep = SlotCache.keep_rows
MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (flat_mask, "llama", "sdpa"),
    (flat_mask, "gpt2", "eager"),
    (no_move, "llama", "sdpa"),
    (position_off_by_one, "llama", "sdpa"),
    (position_off_by_one, "opt", "sdpa"),
    (no_rollback, "llama", "sdpa"),
    (any_twin, "llama", "sdpa"),
    pytest.param(padding_over_cached_slots, "llama", "sdpa", marks=pytest.mark.slow),  # the longest walk
    (window_by_slot, "mistral", "narrow"),
    (window_by_slot, "gemma3", "narrow"),
    (no_window, "mistral", "sdpa"),
    (no_window, "gemma3", "sdpa"),
    (no_position_bias, "t5", "sdpa"),
    (boolean_mask_for_eager, "llama", "eager"),
    (rows_mixed_up, "llama", "sdpa"),
]


@pytest.mark.parametrize(("mutant", "family", "attention"), MUTANTS)
def test_the_walk_notices(mutant, family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    model = tiny.narrow(family) if attention == "narrow" else tiny.tiny(family, attention)
    worst = 0.0
    for seed in range(48):  # padding over what is cached harms few walks
        try:
            worst = max(worst, walk(open_session(model, 4), 14, seed))
        except (IndexError, RuntimeError, KeyError):  # a crash is notice enough
            worst = float("inf")
        if worst > NOTICED:
            return
    pytest.fail(f"{mutant.__name__} changed no logit by more than {worst}")


def test_the_accounts_notice_a_draft_that_is_dropped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Session._keep

    def silent(self, row, reading, draft):
        before = self.use.rolled_back
        found = kept(self, row, reading, draft)
        self.use.rolled_back = before
        return found

    monkeypatch.setattr(Session, "_keep", silent)
    session = open_session(tiny.tiny("llama"), 2)
    walk(session, 12, 0)
    assert not balanced(session)


def test_the_accounts_notice_text_that_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Session.plan

    def again(self, request):
        self._readings[request.row].read = 0
        return plan(self, request)

    monkeypatch.setattr(Session, "plan", again)
    session = open_session(tiny.tiny("llama"), 2)
    walk(session, 12, 0)
    assert not balanced(session)
