"""Blocks of texts: every token once, each text as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch

from csdraft.data.packing import IGNORED, Texts, best_fit, collate, collate_seq2seq
from tests.tiny import VOCAB, tiny


def rows_of(lengths: list[int], prompts: list[int] | None = None) -> list[dict]:
    chosen = random.Random(0)
    prompts = prompts or [0] * len(lengths)
    return [
        {"input_ids": [chosen.randrange(3, VOCAB) for _ in range(length)], "prompt_length": prompt}
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def texts_in(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """Row, start and stop of every text, filling included: positions restart with each."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        found += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_places_each_text_once_within_the_size(seed):
    chosen = random.Random(seed)
    lengths = [chosen.randrange(1, 65) for _ in range(200)]
    blocks = best_fit(lengths, 64)
    assert sorted(text for block in blocks for text in block) == list(range(200))
    assert max(sum(lengths[text] for text in block) for block in blocks) <= 64
    assert len(blocks) <= 1.1 * sum(lengths) / 64 + 1


def test_every_token_is_packed_once_with_its_own_label():
    rows = rows_of([5, 30, 1, 17, 32, 9], [0, 10, 0, 17, 1, 4])
    packed = Texts(rows, 32, pad=7)
    batch = collate([packed[i] for i in range(len(packed))])
    found = {}
    for row, start, stop in texts_in(batch):
        ids, labels = (batch[name][row, start:stop].tolist() for name in ("input_ids", "labels"))
        found[tuple(ids)] = labels
    for row in rows:
        labels = found.pop(tuple(row["input_ids"]))
        unscored = max(row["prompt_length"], 1)
        assert labels == [IGNORED] * unscored + row["input_ids"][unscored:]
    assert all(set(ids) == {7} and set(labels) == {IGNORED} for ids, labels in found.items())  # filling
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (len(packed), 32)


def test_tokens_that_nobody_scored_have_no_label():
    row = rows_of([6], [2])[0] | {"scored": [0, 0, 1, 0, 1, 1]}
    assert (Texts([row], 8)[0]["labels"] != IGNORED).tolist() == [False, False, True, False, True, True, False, False]


FAMILIES = [
    ("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gpt2", "sdpa"),
    ("gpt2", "eager"), ("gemma3", "sdpa"), ("qwen3", "sdpa"), ("gpt_neox", "eager"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_a_packed_text_has_the_logits_that_it_has_alone(family, attention, packing):
    """Longer than the window of those that have one; filling makes no difference either."""
    model = tiny(family, attention)
    rows = rows_of([40, 3, 23, 35, 1, 18, 64])
    data = Texts(rows, 64, packing=packing)
    batch = collate([data[i] for i in range(len(data))], pad=5)
    del batch["labels"]
    logits = model(**batch, use_cache=False).logits
    seen = 0
    for row, start, stop in texts_in(batch):
        ids = batch["input_ids"][row, start:stop]
        alone = model(input_ids=ids[None], use_cache=False).logits[0]
        assert (logits[row, start:stop] - alone).abs().max() < 1e-4
        seen += ids.tolist() in [r["input_ids"] for r in rows]
    assert seen == len(rows)


@torch.no_grad()
def test_an_encoder_decoder_reads_the_prompt_and_is_scored_on_the_rest():
    model = tiny("t5")
    rows = rows_of([12, 7, 20], [5, 6, 9])
    data = Texts(rows, 32, decoder_start=0)
    batch = collate_seq2seq([data[i] for i in range(3)])
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    for i, row in enumerate(rows):
        prompt, text = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        assert labels[i, : len(text)].tolist() == text
        assert (labels[i, len(text) :] == IGNORED).all()
        alone = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *text[:-1]]]), use_cache=False
        ).logits[0]
        assert (logits[i, : len(text)] - alone).abs().max() < 1e-4


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="no rows to train on"):
        Texts([], 8)
    with pytest.raises(ValueError, match="row 1 has 9 tokens, blocks have 8"):
        Texts(rows_of([3, 9]), 8)
    with pytest.raises(ValueError, match="row 0 has a prompt of 0 tokens and 4 after it"):
        Texts(rows_of([4]), 8, decoder_start=0)[0]
