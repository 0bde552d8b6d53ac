"""Compiled forwards, on a CPU too: the same text from the same shapes."""

import pytest
import torch

import csdraft
from csdraft import MaxGram, ModelDrafter
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


def test_a_users_own_compiled_model_keeps_its_attention(monkeypatch):
    """Compiled after csdraft's forwards: it is transformers' attention, which repeats grouped heads."""
    target, ids = tiny("llama"), ragged_batch((20,))["input_ids"]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    asked: list[bool] = []

    def backend(graph, example):
        asked.append(any("enable_gqa" in node.kwargs and node.kwargs["enable_gqa"] for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    own = torch.compile(target, backend=backend, dynamic=False)
    target.generate(ids, **WANTED, assistant=MaxGram())
    with torch.no_grad():
        own(ids, attention_mask=mask, use_cache=False)
    torch._dynamo.reset()
    assert asked
    assert not any(asked)
