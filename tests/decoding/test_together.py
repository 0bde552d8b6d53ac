"""Batches with code of the user's: processors and criteria see all rows once a step, as in plain `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import StoppingCriteria

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from tests import tiny
from tests.tiny import EOS, PAD, VOCAB, Scripted

ROWS = 3


class Code:
    """Custom code that writes down what it was shown, and cannot be copied."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> None:
        raise TypeError("this holds a file")

    def note(self, ids: Tensor) -> int:
        self.seen.append(ids.tolist())
        return len(self.seen)


class ByRow(Code, LogitsProcessor):
    """Favours another token in each row."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.note(ids)
        return scores + 2.5 * torch.eye(len(scores), VOCAB).roll(40, 1)


class FirstRow(Code, LogitsProcessor):
    """Changes the first row, in place."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 50 + self.note(ids) % 3] += 4.0
        return scores


class ByCall(Code, LogitsProcessor):
    """Favours another token at each call."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 3 + self.note(ids)] += 3.0
        return scores


class AcrossRows(Code, LogitsProcessor):
    """Forbids each row the last token of the next."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.note(ids)
        return scores.scatter(1, ids[:, -1:].roll(1, 0), float("-inf")) - 0.1 * scores.roll(1, 0)


class RowLimit(Code, StoppingCriteria):
    """Ends each row at a length of its own."""

    def __call__(self, ids: Tensor, scores, **kwargs) -> Tensor:
        self.note(ids)
        return ids.shape[1] >= torch.tensor([25, 31, 37])


class AnyRow(Code, StoppingCriteria):
    """Ends all rows once one of them has written a multiple of 9."""

    def __call__(self, ids: Tensor, scores, **kwargs) -> Tensor:
        return (ids[:, -1] % 9 == 0).any().expand(len(ids)) & (self.note(ids) > 4)


class EachRow(Code, StoppingCriteria):
    """Ends a row that has written a multiple of 7."""

    def __call__(self, ids: Tensor, scores, **kwargs) -> Tensor:
        self.note(ids)
        return ids[:, -1] % 7 == 0


PROCESSORS = [ByRow, FirstRow, ByCall, AcrossRows]
CRITERIA = [RowLimit, AnyRow, EachRow]


def options_of(code: type, instance: Code, **more) -> dict:
    kind = "stopping_criteria" if issubclass(code, StoppingCriteria) else "logits_processor"
    return {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, kind: [instance], **more}


def assistants(model, texts):
    noisy = tiny.drafter_of("llama")
    return {
        "chain": Scripted(texts, wrong=0.2),
        "tree": Scripted(texts, wrong=0.2, branches=3),
        "copies": MaxGram(),
        "model": ModelDrafter(noisy),
        "itself": ModelDrafter(model, depth=3),
        "cascade": CascadeDrafter([noisy, MaxGram()], [[3, 6], [0, 3]]),
    }


@pytest.mark.parametrize("ends", [EOS, pytest.param(None, marks=pytest.mark.slow)], ids=["eos", "no eos"])
@pytest.mark.parametrize("code", PROCESSORS + CRITERIA)
def test_code_that_treats_rows_differently(code: type, ends: int | None) -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", ROWS)
    plain = code()
    more = {"eos_token_id": ends, "return_dict_in_generate": True, "output_scores": True}
    if ends is not None:  # tokens that really occur, so that rows end apart
        told = model.generate(**inputs, **options_of(code, code(), eos_token_id=None))
        more["eos_token_id"] = [int(told[0, -3]), int(told[1, -1])]
    wanted = model.generate(**inputs, **options_of(code, plain, **more))
    for name, assistant in assistants(model, tiny.continuations(wanted.sequences, inputs)).items():
        own = code()
        options = options_of(code, own, **more)
        ours = model.generate(**inputs, **options, assistant=assistant, schedule="fixed", strict=True)
        assert ours.sequences.tolist() == wanted.sequences.tolist(), name
        assert own.seen == plain.seen, name
        assert len(ours.scores) == len(wanted.scores)
        for step, scores in enumerate(ours.scores):
            torch.testing.assert_close(scores, wanted.scores[step], atol=1e-4, rtol=1e-4)
        if name in ("chain", "tree") and len(wanted.scores) > 5:
            assert ours.report.target_calls < len(wanted.scores), name


@pytest.mark.parametrize("answer", [bool, int, np.array, lambda ends: torch.tensor(ends).long()])
def test_criteria_may_answer_in_other_types(answer: Callable[[bool], object]) -> None:
    """Plain generate combines what a criterion answers with its own tensor, which may widen its type."""
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 2)
    criteria = [lambda ids, scores, **_: answer(ids.shape[1] >= 27)]
    options = {**inputs, "max_new_tokens": 12, "do_sample": False, "stopping_criteria": criteria}
    wanted = model.generate(**options)
    assert wanted.shape[1] == 27
    ours = model.generate(**options, assistant=tiny.drafter_of("llama"), schedule="fixed", strict=True)
    assert ours.tolist() == wanted.tolist()


def test_rows_that_a_criterion_has_ended_write_on_without_an_end_token() -> None:
    """transformers' own criteria too: stop strings in a batch without an end-of-text token."""
    model, tokenizer, inputs = tiny.tiny("llama"), tiny.tokenizer(), tiny.inputs_of("llama", ROWS)
    free = {**inputs, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    told = model.generate(**free)
    strings = [tokenizer.decode(told[row, 24 + row : 26 + row]) for row in range(ROWS)]
    options = free | {"stop_strings": strings, "tokenizer": tokenizer}
    wanted = model.generate(**options)
    ours = model.generate(**options, assistant=MaxGram(), schedule="fixed")
    assert ours.tolist() == wanted.tolist()


def test_sampled_rows_do_not_depend_on_the_drafter() -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", ROWS)
    options = {**inputs, "max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "row_seeds": [1, 2, 3]}
    told = model.generate(**options, logits_processor=[ByRow()], assistant=Scripted([[]] * ROWS, depth=1, wrong=1.0))
    for assistant in assistants(model, tiny.continuations(told, inputs)).values():
        ours = model.generate(**options, logits_processor=[ByRow()], assistant=assistant, schedule="fixed")
        assert ours.tolist() == told.tolist()


def test_a_rule_that_judges_row_after_row_is_refused_by_name() -> None:
    small = tiny.drafter_of("llama")
    options = {**tiny.inputs_of("llama", ROWS), "max_new_tokens": 4, "assistant": small, "verifier": "rejection"}
    model = tiny.tiny("llama")
    with pytest.raises(ValueError, match=r"Rejection handles .* ByRow may treat rows differently.*verifier='match'"):
        model.generate(**options, do_sample=True, logits_processor=[ByRow()])
    greedy = options | {"do_sample": False}
    wanted = model.generate(**{k: v for k, v in greedy.items() if k not in ("assistant", "verifier")})
    assert model.generate(**greedy).tolist() == wanted.tolist()


def test_encoder_decoders_run_users_code_as_plain_generate_does() -> None:
    model, inputs = tiny.tiny("t5"), tiny.inputs_of("t5", ROWS)
    options = {**inputs, "max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(**options, logits_processor=[ByCall()], stopping_criteria=[EachRow()])
    texts = [row.tolist() for row in wanted]
    for assistant in (Scripted(texts, wrong=0.2), tiny.drafter_of("t5")):
        custom = {"logits_processor": [ByCall()], "stopping_criteria": [EachRow()]}
        ours = model.generate(**options, **custom, assistant=assistant, schedule="fixed", strict=True)
        assert ours.tolist() == wanted.tolist()


@pytest.mark.parametrize("sequences", [1, 2])
def test_prefix_constraints_are_told_the_prompt(sequences: int) -> None:
    """Which is the row's number, or, of several sequences a prompt, the prompt's (from transformers 5.24 on)."""
    told: set[int] = set()

    def allowed(prompt: int, ids: Tensor) -> list[int]:
        told.add(prompt)
        return [5 + prompt, 10 + int(ids[-1]) % 7 + 12 * prompt, 4 + len(ids) % 3]

    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", ROWS)
    options = {**inputs, "max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed, "num_return_sequences": sequences}
    model.generate(**options, do_sample=sequences > 1, top_k=1)
    plain = set(told)
    told.clear()
    model.generate(**options, do_sample=sequences > 1, top_k=1, assistant=MaxGram(), schedule="fixed")
    assert told == plain


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_target_that_drafts_for_itself_shows_its_drafts_to_nobody(rows: int) -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", rows)
    options = {**inputs, "max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(**options, logits_processor=[ByCall()], stopping_criteria=[AnyRow()])
    itself = (model, ModelDrafter(model), CascadeDrafter([model, MaxGram()], [[2, 5], [0, 3]]))
    for assistant in itself:
        processor, criterion = ByCall(), AnyRow()
        custom = {"logits_processor": [processor], "stopping_criteria": [criterion]}
        ours = model.generate(**options, **custom, assistant=assistant, schedule="fixed", strict=True)
        assert ours.tolist() == wanted.tolist()
        assert len(processor.seen) == len(criterion.seen) == wanted.shape[1] - inputs["input_ids"].shape[1]
