"""Packed weights: the same numbers, the user's model untouched, and no change of it unnoticed."""

import gc
import weakref
from collections import defaultdict
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import csdraft
from csdraft import MaxGram, ModelDrafter
from csdraft.decoding import packed as module
from csdraft.decoding.packed import PackedLinear, held_packed, packed
from tests.tiny import drafter_of, fresh, inputs_of, prompt, ragged_batch

WANTED = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
pytestmark = pytest.mark.skipif(not module._has_kernels(), reason="needs oneDNN's kernels")


@pytest.fixture(autouse=True)
def _all_weights(monkeypatch):
    """All weights are packed and always used, however small they and the model are."""
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "CACHED", 0)
    csdraft.release()
    yield
    csdraft.release()


@pytest.fixture
def multiplied(monkeypatch):
    """Counts the multiplications by packed weights."""
    found, multiply = [], PackedLinear._multiplied
    monkeypatch.setattr(PackedLinear, "_multiplied", lambda self, given: found.append(1) or multiply(self, given))
    return found


def wide(dtype: torch.dtype, bias: bool = False) -> nn.Module:
    """A model with weights large enough for every kernel."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=bias, mlp_bias=bias)).to(dtype).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 40])
@torch.no_grad()
def test_bfloat16_gives_the_same_bits(queries, bias):
    model = wide(torch.bfloat16, bias)
    ids = torch.randint(0, 1024, (1, queries))
    assert torch.equal(packed(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 7)])
@torch.no_grad()
def test_float32_gives_the_same_numbers(shape, bias, multiplied):
    model = wide(torch.float32, bias)
    ids = torch.randint(0, 1024, shape)
    assert torch.allclose(packed(model)(ids).logits, model(ids).logits, atol=1e-5)
    assert len(multiplied) == 15


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 0), (torch.bfloat16, 15)])
@torch.no_grad()
def test_in_a_model_that_fits_the_cache_one_row_of_float32_takes_the_weights_as_they_are(
    dtype, expected, multiplied, monkeypatch
):
    model = wide(dtype)
    monkeypatch.setattr(module, "CACHED", sum(p.numel() * p.element_size() for p in model.parameters()))
    twin, ids = packed(model), torch.randint(0, 1024, (1, 2))
    if dtype == torch.float32:
        assert torch.equal(twin(ids[:, :1]).logits, model(ids[:, :1]).logits)
    else:
        twin(ids[:, :1])
    assert len(multiplied) == expected
    twin(ids)
    assert len(multiplied) == expected + 15


def test_the_model_is_left_as_it_was():
    model = fresh("llama")
    before = [dict(vars(part)) for part in model.modules()]
    twin = packed(model)
    assert twin is not model
    assert [dict(vars(part)) for part in model.modules()] == before
    assert not set(twin.modules()) & set(model.modules())
    assert [id(one) for one in twin.parameters()] == [id(one) for one in model.parameters()]
    assert packed(model) is twin


def by_data(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 1.0


def by_another_parameter(model):
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def by_a_step(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2.0)


@pytest.mark.parametrize("change", [by_data, by_another_parameter, by_a_step])
def test_changed_weights_are_noticed(change, multiplied):
    model = fresh("llama", tie_word_embeddings=False)
    ids = prompt()["input_ids"]
    model.generate(ids, **WANTED, assistant=MaxGram(), reuse=False)
    change(model)
    multiplied.clear()
    wanted = model.generate(ids, **WANTED)
    assert torch.equal(model.generate(ids, **WANTED, assistant=MaxGram(), reuse=False), wanted)
    assert not multiplied  # it may be in training
    assert torch.equal(model.generate(ids, **WANTED, assistant=MaxGram(), reuse=False), wanted)
    assert multiplied


def doubled(weight):
    weight.mul_(2)


def negative(weight):
    weight.neg_()


def rolled(weight):
    weight.copy_(weight.roll(2, 1).clone())


@pytest.mark.parametrize("change", [doubled, negative, rolled])
@pytest.mark.parametrize("shape", [(16, 4096), (64, 254), (3, 6)])
def test_writes_change_the_sums(shape, change):
    layer = nn.Linear(shape[1], shape[0], bias=False)
    before = module._sums(layer)
    change(layer.weight.data)
    assert module._sums(layer) != before


def test_hooks_and_own_forwards_run():
    model, ran = fresh("llama"), []
    hook = model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    assert packed(model) is model
    model.generate(**prompt(), **WANTED, assistant=MaxGram())
    assert ran
    hook.remove()
    assert packed(model) is not model
    model.lm_head.forward = model.lm_head.forward
    assert packed(model) is model


def test_in_training_mode_nothing_is_packed():
    model = fresh("llama").train()
    assert packed(model) is model


def test_a_second_copy_must_fit_into_memory(monkeypatch):
    model = fresh("llama")
    size = sum(part.weight.numel() * 4 for part in model.modules() if type(part) is nn.Linear)
    monkeypatch.setattr(module, "memory_of", lambda device: 4.0 * size - 1)
    assert packed(model) is model
    csdraft.release()
    monkeypatch.setattr(module, "memory_of", lambda device: 4.0 * size)
    assert packed(model) is not model
    assert held_packed(model) == held_packed() == size
    other = fresh("llama", seed=1)
    assert packed(other) is other
    assert csdraft.release(model) == size
    assert held_packed() == 0


def test_packed_weights_go_with_their_model():
    model = fresh("llama")
    model.generate(**prompt(), **WANTED, assistant=MaxGram())
    assert held_packed() > 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert held_packed() == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "phi3", "t5", "flan"])
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_are_those_of_generate(family, rows, multiplied):
    target, inputs = fresh(family), inputs_of(family, rows)
    wanted = target.generate(**inputs, **WANTED)
    for assistant in (MaxGram(), ModelDrafter(drafter_of(family))):
        assert torch.equal(target.generate(**inputs, **WANTED, assistant=assistant), wanted)
    assert multiplied


def test_graphs_false_runs_the_models_own_forward(multiplied):
    target = fresh("llama")
    wanted = target.generate(**prompt(), **WANTED)
    assert torch.equal(target.generate(**prompt(), **WANTED, assistant=MaxGram(), graphs=False), wanted)
    assert not multiplied
    assert held_packed() == 0


def test_adapters_are_switched(multiplied):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    target, inputs = get_peft_model(fresh("llama"), config).eval(), ragged_batch((20, 5))
    for _ in range(2):
        wanted = target.generate(**inputs, **WANTED)
        assert torch.equal(target.generate(**inputs, **WANTED, assistant=MaxGram()), wanted)
        with target.disable_adapter():
            without = target.generate(**inputs, **WANTED)
            assert torch.equal(target.generate(**inputs, **WANTED, assistant=MaxGram()), without)
    assert not torch.equal(wanted, without)


def by_another_class(model):
    class Twice(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    Twice.__module__ = "transformers.tests"
    model.model.layers[0].mlp.__class__ = Twice


def by_order(model):
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())


def by_order_of_data(model):
    model.lm_head.weight.data.copy_(model.lm_head.weight.flip(0).clone())


def by_columns_of_data(model):
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data.copy_(weight.roll(8, 1).clone())  # heads in another order


def by_dropout(model):
    model.model.layers[0].self_attn.attention_dropout = 0.0
    model.eval()


CHANGES = [by_another_class, by_order, by_order_of_data, by_columns_of_data, by_dropout]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_noticed(change):
    model = fresh("llama", tie_word_embeddings=False)
    ids = prompt()["input_ids"]
    if change is by_dropout:
        model.model.layers[0].self_attn.attention_dropout = 0.5
        model.model.layers[0].train()
    model.generate(ids, **WANTED, assistant=MaxGram(), reuse=False)
    change(model)
    for _ in range(3):
        wanted = model.generate(ids, **WANTED)
        assert torch.equal(model.generate(ids, **WANTED, assistant=MaxGram(), reuse=False), wanted)


class Own(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given, **named):
        return self.inner(*given, **named)


def set_module(model):
    model.model.layers[0].mlp = Own(model.model.layers[0].mlp)


def set_partial(model):
    model.helper = partial(model.get_input_embeddings)


def set_closure(model):
    model.helper = lambda: model


def set_circle(model):
    model.helper = ["itself"]
    model.helper += [model.helper] * 4


def set_subclass(model):
    class Weight(nn.Parameter):
        pass

    model.lm_head.weight = Weight(model.lm_head.weight.detach())


@pytest.mark.parametrize("change", [set_module, set_partial, set_closure, set_circle])
def test_what_may_refer_to_the_model_runs_as_it_is(change):
    model = fresh("llama")
    assert packed(model) is not model
    change(model)
    assert packed(model) is model
    wanted = model.generate(**prompt(), **WANTED)
    assert torch.equal(model.generate(**prompt(), **WANTED, assistant=MaxGram()), wanted)


@torch.no_grad()
def test_other_weights_stay_as_they_are():
    model = fresh("llama", tie_word_embeddings=False)
    set_subclass(model)
    assert type(packed(model).lm_head) is nn.Linear
    twin = packed(fresh("llama", seed=1))
    assert twin.lm_head(torch.zeros(0, 32)).shape == (0, 97)


def test_a_dictionary_of_any_class_is_copied():
    model, ids = fresh("llama"), prompt()["input_ids"]
    model.parts = defaultdict(list, {"decoder": model.model})
    twin = packed(model)
    assert twin.parts["decoder"] is twin.model
    assert twin.parts["other"] == []
    assert model.parts.keys() == {"decoder"}
    assert torch.equal(model.generate(ids, **WANTED, assistant=MaxGram()), model.generate(ids, **WANTED))


def test_a_processor_that_cannot_pack_runs_the_model(monkeypatch):
    def fails(*_):
        raise RuntimeError("bf16 path needs the cpu support")

    model, ids = fresh("llama"), prompt()["input_ids"]
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fails)
    assert packed(model) is model
    assert torch.equal(model.generate(ids, **WANTED, assistant=MaxGram()), model.generate(ids, **WANTED))


def test_captured_hidden_states_do_not_end_packing():
    model = fresh("llama")
    with torch.no_grad():
        model(**prompt(), output_hidden_states=True)
    assert packed(model) is not model
