"""Bugs put in on purpose, one at a time: the random walk of test_session.py must notice every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from csdraft.decoding import runner
from csdraft.decoding.cache import SlotCache
from csdraft.decoding.draft import Draft
from csdraft.decoding.runner import Feed, Runner
from csdraft.decoding.session import Session
from tests import tiny
from tests.decoding.walk import balanced, open_session, walk

NOTICED = 0.05


def flat_mask(patch: pytest.MonkeyPatch) -> None:
    """A draft's nodes see all earlier ones, other branches too."""
    plan = Session.plan

    def flat(self, request):
        feed, queries = plan(self, request)
        if feed.extra is not None:
            feed.extra, feed.sees = [()] * len(feed.tokens), [slot + 1 for slot in feed.slots]
        return feed, queries

    patch.setattr(Session, "plan", flat)


def no_move(patch: pytest.MonkeyPatch) -> None:
    """An accepted branch stays where it was."""
    patch.setattr(SlotCache, "move", lambda *_: None)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A draft stands one position too far on."""
    plan = Session.plan

    def shifted(self, request):
        feed, queries = plan(self, request)
        feed.positions = [p + (p >= len(request.text)) for p in feed.positions]
        return feed, queries

    patch.setattr(Session, "plan", shifted)


def no_rollback(patch: pytest.MonkeyPatch) -> None:
    """What was drafted counts as text, whatever the text says."""
    advance = Session._advance

    def trusting(self, row, reading):
        if reading.read + len(reading.draft) <= len(reading.text) and reading.draft.is_chain:
            reading.read += len(reading.draft)
            reading.draft, reading.slots = Draft(), []
        return advance(self, row, reading)

    patch.setattr(Session, "_advance", trusting)


def any_twin(patch: pytest.MonkeyPatch) -> None:
    """A cached node is reused for any token below the same parent."""
    child = Draft.child

    def first(self, node, token):
        found = child(self, node, token)
        return found if found is not None or not self.children(node) else self.children(node)[0]

    patch.setattr(Draft, "child", first)


def padding_over_cached_slots(patch: pytest.MonkeyPatch) -> None:
    """A short row's padding is written behind what is fed instead of behind all that is cached."""
    ragged = Runner._ragged

    def padded(feed: Feed, queries: int) -> Feed:
        pad, slot = queries - len(feed.tokens), feed.slots[-1] + 1
        extra = [(slot,)] * pad + list(feed.extra or [()] * len(feed.tokens))
        zeros = [0] * pad
        tokens, positions, sees = zeros + feed.tokens, zeros + feed.positions, zeros + feed.sees
        end = max(feed.end, slot + 1)
        return replace(
            feed, tokens=tokens, slots=[slot] * pad + feed.slots, positions=positions, sees=sees, extra=extra, end=end
        )

    def mutant(self: Runner, feeds: Sequence[Feed], *others: Any) -> dict:
        queries = max(len(feed.tokens) for feed in feeds)
        return ragged(self, [padded(feed, queries) for feed in feeds], *others)

    patch.setattr(Runner, "_ragged", mutant)


def window_by_slot(patch: pytest.MonkeyPatch) -> None:
    """A sliding window is measured in slots, not positions."""
    ragged = Runner._ragged
    patch.setattr(
        Runner, "_ragged", lambda self, feeds, *more: ragged(self, [replace(f, elsewhere=[]) for f in feeds], *more)
    )


def no_window(patch: pytest.MonkeyPatch) -> None:
    """A sliding window is forgotten."""
    patch.setattr(runner, "_spanned", lambda allowed, *spans: allowed)


def no_position_bias(patch: pytest.MonkeyPatch) -> None:
    """T5's bias goes by slot."""
    patch.setattr(Runner, "_position_bias", lambda self, positions, standing: torch.zeros(()))


def boolean_mask_for_eager(patch: pytest.MonkeyPatch) -> None:
    """Eager attention gets a boolean mask, which it adds."""
    patch.setattr(Runner, "_additive", lambda self, allowed: allowed)


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
    (padding_over_cached_slots, "llama", "sdpa"),
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
    advance = Session._advance

    def silent(self, row, reading):
        before = self.rolled_back
        found = advance(self, row, reading)
        self.rolled_back = before
        return found

    monkeypatch.setattr(Session, "_advance", silent)
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
