"""A drafter that can copy nearly all of the text changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.schedules.fixed import Fixed
from tests import tiny

__all__ = ["draws", "quotes"]


def draws(test: Callable) -> Callable:
    """Runs a test with `rows` and `how` to draw."""
    how = [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 5}]
    return pytest.mark.parametrize("rows", [1, 3])(pytest.mark.parametrize("how", how)(test))


def quotes(rows: int, how: dict, make: Callable[[list[int], list[int]], Drafter], depth: int = 8) -> None:
    """The text is the same with `make(prompt, text)`, which knows the first row's and ends while it is copied."""
    inputs, seeds = tiny.inputs_of("llama", rows), list(range(rows))
    options = how | {"max_new_tokens": 24, "row_seeds": seeds, "strict": True, "schedule": Fixed(depth)}
    options |= {"return_dict_in_generate": True}
    model = tiny.tiny("llama")
    text = model.generate(**inputs, assistant=MaxGram(), **options).sequences[0, 20:].tolist()
    options["eos_token_id"] = end = max(text[:14], key=text.index)
    plain = model.generate(**inputs, assistant=MaxGram(), **options)
    assert 5 < plain.sequences[0, 20:].tolist().index(end) < 14
    output = model.generate(**inputs, assistant=make(inputs["input_ids"][0].tolist(), text), **options)
    assert torch.equal(output.sequences, plain.sequences)
    assert output.report.target.accepted.total() > 3
