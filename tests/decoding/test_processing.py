"""Processors at many positions at once: the same bits as one position after the other, as plain `generate` does it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Request
from csdraft.decoding.processing import Before, Processing
from csdraft.decoding.text import Text

VOCAB = 40
PENALTY = RepetitionPenaltyLogitsProcessor(1.3)
KINDS = {
    "penalty": [PENALTY],
    "penalty without padding": [RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=torch.tensor([2, 0, 1]))],
    "penalty of what is new": [RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=4)],
    "penalty of what is newer than the text": [RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=5)],
    "length": [MinLengthLogitsProcessor(7, [3, 5])],
    "new tokens": [MinNewTokensLengthLogitsProcessor(4, 3, [3])],
    "several": [
        PENALTY,
        MinNewTokensLengthLogitsProcessor(4, 3, [3]),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(9),
        RepetitionPenaltyLogitsProcessor(0.8),
    ],
}


def requests() -> list[Request]:
    """A chain, a tree and an empty draft; padding in front of one text, and ids beyond the vocabulary."""
    padded = Text(torch.tensor([0, 0, 9, 2]), torch.tensor([0, 0, 1, 1]))
    grown = Text(torch.tensor([4, 4, 7, VOCAB + 3]))
    grown.append([11, 3])
    tree = Draft().attach([5, 6, 7, 8], [ROOT, ROOT, 1, 2], 0)
    return [
        Request(0, padded, Draft.chain([12, 9, VOCAB + 1]), range(ROOT, 3)),
        Request(1, grown, tree, [ROOT, 1, 3]),
        Request(2, Text(torch.tensor([1, 2, 3, 4])), Draft(), [ROOT]),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_at_once_gives_the_same_bits_as_one_by_one(kind: str) -> None:
    processing = Processing(LogitsProcessorList(KINDS[kind]), 3)
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    assert processing.at_once
    assert not processing.text_blind
    found = processing.all_at_once(logits, processing.before(requests(), logits))
    rows = iter(logits)
    wanted = [
        processing.one(
            request.row, request.text.padded([request.draft.tokens[i] for i in request.draft.path(node)]), next(rows)
        )
        for request in requests()
        for node in request.after
    ]
    assert torch.equal(found, torch.stack(wanted))
    assert not torch.equal(found, logits), "the processors must have changed something"


@pytest.mark.parametrize(
    "other", [NoRepeatNGramLogitsProcessor(2), RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=2)]
)
def test_processors_that_need_more_go_one_by_one(other) -> None:
    assert not Processing(LogitsProcessorList([PENALTY, other]), 1).at_once


def test_logits_of_several_widths() -> None:
    processing = Processing(LogitsProcessorList(KINDS["length"]), 1)
    for vocab in (VOCAB, VOCAB + 8):
        scores = processing.all_at_once(torch.zeros(1, vocab), Before([6]))
        assert scores.isinf().nonzero()[:, 1].tolist() == [3, 5]


def test_a_row_that_ignores_more_than_its_text_is_known() -> None:
    """Its drafted tokens do not count as seen either, until the text is as long."""
    processing = Processing([RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=5)], 1)
    text = Text(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 1]))
    assert processing.ignores_new(0, text)
    text.append([7])
    assert not processing.ignores_new(0, text)
