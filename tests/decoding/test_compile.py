"""Compiled forwards, on a CPU too: the same text from the same shapes."""

import pytest
import torch

import csdraft
from csdraft import ModelDrafter
from csdraft.decoding import graphs
from tests.tiny import drafter_of, ragged_batch, tiny

pytestmark = pytest.mark.slow
WANTED = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


def test_compiled_forwards_write_the_same_text(monkeypatch):
    """Some minutes: each shape is compiled when it first runs."""
    compiled, ran = graphs.compiled, []

    def counted():
        way = compiled()
        return lambda model, arguments: ran.append(arguments["input_ids"].shape) or way(model, arguments)

    monkeypatch.setattr(graphs, "compiled", counted)
    csdraft.release()
    target, inputs = tiny("llama"), ragged_batch((9, 4))
    plain = target.generate(**inputs, **WANTED)
    drafter = ModelDrafter(drafter_of("llama"), depth=3)
    text = target.generate(**inputs, **WANTED, assistant=drafter, schedule="fixed", graphs="compile")
    csdraft.release()
    torch._dynamo.reset()
    assert torch.equal(text, plain)
    assert len(ran) > 8
    assert {queries.bit_count() for _, queries in ran} == {1}, "shapes are powers of two"
