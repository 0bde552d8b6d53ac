"""An encoder-decoder's texts rewritten by the student: no longer than before, and each from its own seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csdraft.data.packing import IGNORED, Texts, collate_seq2seq
from csdraft.trainers.on_policy import OnPolicy, _chosen, texts_of
from csdraft.trainers.run import distill
from csdraft.trainers.students import save_student
from tests.tiny import VOCAB, drafter_of, tiny, tokenizer
from tests.trainers.pair import arguments

ROWS = [
    {"input_ids": [*range(5, 5 + source), *range(20, 20 + text)], "prompt_length": source}
    for source, text in ((3, 9), (8, 4), (5, 1), (6, 7))
]
START = 0
NO_END = 1 << 20


def batch_of(*rows: int) -> dict[str, Tensor]:
    items = Texts(ROWS, 20, decoder_start=START)
    return collate_seq2seq([items[row] for row in rows])


def rewrite(batch: dict[str, Tensor], student: Any, share: float = 1.0, step: int = 0) -> list[list[int]]:
    """The new texts; `decoder_input_ids` must be the same one place later."""
    made = OnPolicy(share, 64, 1.0, 0, VOCAB).rewritten(batch, student, (0, step))
    assert made["input_ids"] is batch["input_ids"]
    texts = []
    for labels, read in zip(made["labels"], made["decoder_input_ids"], strict=True):
        text = labels[labels != IGNORED]
        assert labels[: len(text)].tolist() == text.tolist()
        assert read[0] == START
        assert read[1 : len(text)].tolist() == text[:-1].tolist()
        texts.append(text.tolist())
    return texts


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Any:
    model: Any = drafter_of("flan")
    monkeypatch.setattr(model.generation_config, "eos_token_id", NO_END)
    return model


def test_a_text_is_the_students_and_as_long_as_it_was(student):
    texts = rewrite(batch_of(0, 1, 2, 3), student)
    old = [row["input_ids"][row["prompt_length"] :] for row in ROWS]
    assert [len(text) for text in texts] == [len(text) for text in old]
    assert all(text != before for text, before in zip(texts, old, strict=True))
    assert rewrite(batch_of(0, 1, 2, 3), student) == texts
    assert rewrite(batch_of(0, 1, 2, 3), student, step=1) != texts


def test_a_text_does_not_depend_on_those_beside_it(student):
    together = rewrite(batch_of(0, 1, 2, 3), student)
    assert [*rewrite(batch_of(0, 3), student), *rewrite(batch_of(2), student)] == [together[row] for row in (0, 3, 2)]


def test_about_the_share_is_rewritten(student):
    """The others stay what they are; which they are changes from step to step."""
    old = [row["input_ids"][row["prompt_length"] :] for row in ROWS]
    kept = [
        [text == before for text, before in zip(rewrite(batch_of(0, 1, 2, 3), student, 0.5, step), old, strict=True)]
        for step in range(16)
    ]
    assert 16 < sum(map(sum, kept)) < 48
    assert len(set(map(tuple, kept))) > 4
    assert rewrite(batch_of(0, 1, 2, 3), student, 0.0) == old


def test_nothing_counts_behind_an_end(student, monkeypatch):
    first = rewrite(batch_of(0, 1, 2, 3), student)
    end = first[0][2]
    monkeypatch.setattr(student.generation_config, "eos_token_id", end)
    for text, whole in zip(rewrite(batch_of(0, 1, 2, 3), student), first, strict=True):
        cut = whole.index(end) + 1 if end in whole else len(whole)
        assert text == whole[:cut]
    assert len(first[0]) > 3


@pytest.mark.slow
def test_an_encoder_decoder_is_distilled_on_its_own_text(tmp_path):
    """However the step is cut up."""
    for name, model in (("target", tiny("flan")), ("student", drafter_of("flan"))):
        save_student(model, tmp_path / name, tokenizer())
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.0}))
    lines = [f'{{"prompt": "Say{i}:", "response": "{"ab1=" * (1 + i % 3)}{i}"}}\n' for i in range(8)]
    Path(tmp_path, "pairs.jsonl").write_text("".join(lines))
    changes = {"dataset": f"{tmp_path}/pairs.jsonl", "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    changes |= {"max_grad_norm": 1e9, "on_policy_prompt": 1}
    states = []
    for rows, share in ((8, 0.6), (2, 0.6), (8, 0.0)):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "on_policy": share}
        states.append(distill(arguments(tmp_path, f"{rows}-{share}", **changes | cut)).student.state_dict())
    whole, parts, corpus = states
    moved = max((whole[name] - tensor).abs().max() for name, tensor in drafter_of("flan").state_dict().items())
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-3 * moved
    assert max((whole[name] - corpus[name]).abs().max() for name in whole) > 0.01 * moved
    assert not any(torch.isnan(tensor).any() for tensor in whole.values())


def test_texts_are_chosen_apart_from_one_another():
    """Packed into one row: a coin a text and step, not one a step."""
    lengths = [5, 7, 6, 8]
    batch = {
        "input_ids": torch.cat([torch.arange(length) + 5 for length in lengths])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
    spans = texts_of(batch)
    chosen = [tuple(_chosen(batch, span, 0.5, (0, step), 2) for span in spans) for step in range(200)]
    assert len(set(chosen)) == 16
    assert all(70 < sum(column) < 130 for column in zip(*chosen, strict=True))
