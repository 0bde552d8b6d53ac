"""Choosing for a whole batch: the same tokens whether at once or, above a limit of memory, few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from csdraft import MaxGram, ModelDrafter
from csdraft.decoding import scores
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Request
from csdraft.decoding.processing import Before, Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.schedules.fixed import Fixed
from tests import tiny

VOCAB = 50


def chooser() -> TokenChooser:
    processing = Processing(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), 3)
    return TokenChooser(processing, Stopping([]), Sampler(True, [0] * 3, VOCAB))


def request(view: Tensor) -> Request:
    """What a (n, vocab) view answers: after a text and n - 1 drafted tokens."""
    return Request(0, Text(torch.tensor([1, 2])), Draft.chain(range(len(view) - 1)))


@pytest.fixture
def widest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of scores each step of choosing processed."""
    seen: list[int] = []
    processed = Processing.all_at_once

    def counted(self: Processing, logits: Tensor, before: Before | None = None) -> Tensor:
        seen.append(len(logits))
        return processed(self, logits, before)

    monkeypatch.setattr(Processing, "all_at_once", counted)
    return seen


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("lengths", [[5], [5, 1, 4]])
def test_no_more_rows_than_the_limit_allows(rows_at_once, lengths, widest, monkeypatch):
    monkeypatch.setattr(scores, "MAX_SCORE_BYTES", 4 * VOCAB * rows_at_once)
    views = [torch.randn(length, VOCAB) for length in lengths]
    assert chooser().choose_all([request(view) for view in views], views) == [
        view.argmax(-1).tolist() for view in views
    ]
    assert max(widest) <= rows_at_once
    if rows_at_once == 1000:
        assert widest == [sum(lengths)], "one step where there is room"


def test_one_row_is_always_possible(widest, monkeypatch):
    monkeypatch.setattr(scores, "MAX_SCORE_BYTES", 1)
    view = torch.randn(4, VOCAB)
    assert chooser().choose_all([request(view)], [view]) == [view.argmax(-1).tolist()]
    assert set(widest) == {1}


def test_nan_is_noticed_in_any_part(monkeypatch):
    monkeypatch.setattr(scores, "MAX_SCORE_BYTES", 4 * VOCAB * 2)
    view = torch.randn(5, VOCAB)
    view[4, 7] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        chooser().choose_all([request(view)], [view])


@pytest.mark.parametrize("options", [{}, {"renormalize_logits": True}])
def test_a_limit_changes_no_text(options, widest, monkeypatch):
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 4)
    wanted = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    monkeypatch.setattr(scores, "MAX_SCORE_BYTES", 4 * tiny.VOCAB * 3)
    for drafter in (MaxGram(), ModelDrafter(tiny.drafter_of("llama"))):
        drafted = {"assistant": drafter, "schedule": Fixed(), "strict": True, **options}
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, **drafted), wanted)
