"""Grouped heads stay grouped where csdraft passes a mask, and nothing else changes for anybody."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from csdraft import MaxGram
from csdraft.decoding.grouped import grouped_heads
from tests.tiny import drafter_of, ragged_batch, tiny

WANTED = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def repeated(monkeypatch):
    """The shapes of keys and values that were repeated for every query head."""
    found, repeat = [], sdpa_attention.repeat_kv
    monkeypatch.setattr(
        sdpa_attention, "repeat_kv", lambda states, times: found.append(states.shape) or repeat(states, times)
    )
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_are_read_without_repeating_keys(repeated, rows):
    target, inputs = tiny("llama"), ragged_batch((20, 3, 11)[:rows])
    plain = target.generate(**inputs, **WANTED)
    before = len(repeated)
    for assistant in (MaxGram(), drafter_of("llama")):
        assert torch.equal(target.generate(**inputs, **WANTED, assistant=assistant, reuse=False), plain)
    assert len(repeated) == before
    attention = target.model.layers[0].self_attn
    assert attention.config._attn_implementation == "sdpa"


def test_outside_nothing_changes(repeated):
    target, ids = tiny("llama"), ragged_batch((20,))["input_ids"]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with torch.no_grad():
        before = target(ids, attention_mask=mask).logits
        with grouped_heads():
            grouped = target(ids, attention_mask=mask).logits
        count = len(repeated)
        after = target(ids, attention_mask=mask).logits
    assert torch.equal(after, before)
    assert torch.allclose(grouped, before, atol=1e-5)
    assert len(repeated) > count
