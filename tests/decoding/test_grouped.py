"""Grouped heads stay grouped where csdraft passes a mask, and nothing else changes for anybody."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from csdraft import MaxGram
from csdraft.decoding.cache import SlotCache
from csdraft.decoding.grouped import GroupedHeads, _has_kernel
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
        with GroupedHeads():
            grouped = target(ids, attention_mask=mask).logits
        count = len(repeated)
        after = target(ids, attention_mask=mask).logits
    assert torch.equal(after, before)
    assert torch.allclose(grouped, before, atol=1e-5)
    assert len(repeated) > count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["no mask", "bool", "float", "a mask for each head"])
def test_one_query_in_half_precision_is_the_same_attention(dtype, groups, kind):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    query = torch.randn(2, 1, 6, 8, dtype=dtype).transpose(1, 2)  # (rows, heads, queries, head_dim)
    key, value = torch.randn(2, 2, 6 // groups, 40, 8, dtype=dtype)[..., :33, :]  # (rows, heads, slots, head_dim)
    seen = torch.rand(2, 6 if kind == "a mask for each head" else 1, 1, 33) < 0.5
    seen[..., 0] = True
    mask = {"no mask": None, "float": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)}.get(
        kind, seen
    )
    whole = [states.double().repeat_interleave(groups, 1) for states in (key, value)]
    scores = query.double() @ whole[0].transpose(2, 3) * 0.3  # (rows, heads, 1, slots)
    right = (scores if mask is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1) @ whole[1]
    with GroupedHeads():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    assert found.shape == (2, 1, 6, 8)
    assert found.is_contiguous()
    assert torch.allclose(found.transpose(1, 2).double(), right, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "size", "card", "cudnn", "grouped"),
    [
        (torch.bfloat16, 128, (9, 0), 91900, True),
        (torch.float16, 64, (10, 0), 91501, True),
        (torch.float32, 128, (9, 0), 91900, False),
        (torch.bfloat16, 256, (9, 0), 91900, False),
        (torch.bfloat16, 128, (8, 0), 91900, False),
        (torch.bfloat16, 128, (9, 0), 91002, False),
    ],
)
def test_heads_stay_grouped_where_a_gpu_has_a_kernel_for_them(monkeypatch, dtype, size, card, cudnn, grouped):
    """Elsewhere PyTorch itself would repeat keys and values, in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    states = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 3, size))
    assert _has_kernel(states, states) is grouped


@pytest.mark.parametrize("rows", [1, 3])
def test_the_indices_of_a_write_need_no_copy_on_a_gpu(rows):
    """There each layer's write copies all indices whose strides differ."""
    slots = torch.arange(4 * rows).view(rows, 4)
    cache = SlotCache(1, rows, 64, torch.device("cpu"), False)
    cache.place(slots, slots, 64)
    row, slot = cache.index_on(slots.device)
    assert row.tolist() == [[place] * 4 for place in range(rows)]
    assert row.stride() == slot.stride()


def test_writing_ragged_rows_in_bfloat16_is_not_slow():
    """Of PyTorch's ways to write by index, scatter_ (2.13, CPU) copies the whole buffer in bfloat16 alone."""
    slots = torch.arange(32)[:, None]

    def seconds(dtype: torch.dtype) -> float:
        cache, states = SlotCache(1, 32, 2048, torch.device("cpu"), False), torch.ones(32, 3, 1, 64, dtype=dtype)
        took = []
        for _ in range(5):
            cache.place(slots, slots, 64)
            began = time.perf_counter()
            cache.update(states, states, 0)
            took.append(time.perf_counter() - began)
        return min(took)

    assert seconds(torch.bfloat16) < 30 * seconds(torch.float32)
