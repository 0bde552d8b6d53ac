"""A model's next call goes on from what its cache holds, and only while that is still right."""

import copy
import gc
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import csdraft
from csdraft import MaxGram, ModelDrafter
from csdraft.decoding import states
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.readers import held
from csdraft.decoding.session import Session
from csdraft.trees.best_first import BestFirst
from tests.tiny import drafter_of, fresh, ragged_batch, tiny

LONG, TURN, ANSWER = 2000, 9, 12
WANTED = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def nothing_is_held():
    csdraft.release()
    yield
    csdraft.release()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (1, count), generator=torch.Generator().manual_seed(seed))


def two_turns(target, assistant, **options):
    """The second turn's output: the first one's answer, and some more to read."""
    first = target.generate(tokens(LONG), **WANTED, assistant=assistant, schedule="fixed", **options)
    prompt = torch.cat([first.sequences, tokens(TURN, seed=1)], 1)
    second = target.generate(prompt, **WANTED, assistant=assistant, schedule="fixed", **options)
    assert torch.equal(second.sequences, target.generate(prompt, **WANTED).sequences)
    return second


def test_the_second_turn_reads_only_its_tail():
    report = two_turns(tiny("llama"), ModelDrafter(drafter_of("llama"))).report
    assert len(report.models) == 2
    for use in report.models.values():
        assert TURN < use.fed < TURN + 8 * ANSWER


class Kernels(TorchDispatchMode):
    """Counts operators that compute or copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_what_is_reused_is_checked_for_all_layers_at_once(monkeypatch):
    """On a GPU each operator takes as long to start as a layer's part takes."""
    counts, prove = [], Session._prove

    def counted(self, rows):
        with Kernels() as mode:
            right = prove(self, rows)
        counts.append(mode.count)
        return right

    monkeypatch.setattr(Session, "_prove", counted)
    for layers in (1, 6):
        two_turns(fresh("llama", num_hidden_layers=layers), MaxGram())
    assert len(counts) == 2
    assert counts[0] == counts[1] < 10


def test_without_reuse_everything_is_read_again():
    report = two_turns(tiny("llama"), ModelDrafter(drafter_of("llama")), reuse=False).report
    assert all(use.fed > LONG for use in report.models.values())
    assert held() == 0


def test_a_text_that_begins_otherwise_shares_what_is_the_same():
    target, prompt = tiny("llama"), tokens(200)
    target.generate(prompt, **WANTED, assistant=MaxGram())
    prompt[0, 150] = 2
    output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(output.sequences, target.generate(prompt, **WANTED).sequences)
    assert 50 < output.report.models["target"].fed < 50 + 12 * ANSWER


@pytest.mark.parametrize("change", ["written", "replaced", "hooked"])
def test_a_model_that_has_changed_reads_again(change):
    target, prompt = fresh("llama"), tokens(200)
    target.generate(prompt, **WANTED, assistant=MaxGram())
    layer = target.model.layers[0].mlp
    with torch.no_grad():
        if change == "written":
            layer.down_proj.weight.mul_(2)
        elif change == "replaced":
            layer.down_proj.weight = torch.nn.Parameter(2 * layer.down_proj.weight)
        else:
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(output.sequences, target.generate(prompt, **WANTED).sequences)
    assert output.report.models["target"].fed >= 200


OF_OTHERS = [
    ("llama", "model.embed_tokens", 0),
    ("llama", "model.embed_tokens", 1 << 20),
    ("gpt2", "transformer.wpe", 1 << 20),
]


@pytest.mark.parametrize(("family", "table", "small"), OF_OTHERS)
def test_other_embeddings_of_tokens_before_the_last_are_noticed(family, table, small, monkeypatch):
    """A write through `.data` counts no version, and the last token's keys and values stay as they were."""
    monkeypatch.setattr(states, "SMALL", small)
    target, prompt = fresh(family), torch.arange(40, 2, -1)[None]
    target.generate(prompt, **WANTED, assistant=MaxGram())
    target.get_submodule(table).weight.data[10:20] *= -2
    output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(output.sequences, target.generate(prompt, **WANTED).sequences)
    assert output.report.models["target"].fed >= prompt.shape[1]


def test_a_faint_adapter_that_is_switched_off_is_noticed():
    """In half precision its keys and values differ by less than rounding may."""
    torch.manual_seed(0)
    rank = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted, prompt = get_peft_model(fresh("llama"), rank).eval().to(torch.bfloat16), tokens(200)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.mul_(0.02 if "lora_B" in name else 1.0)
    adapted.generate(inputs=prompt, **WANTED, assistant=MaxGram())
    with adapted.disable_adapter():
        output = adapted.generate(inputs=prompt, **WANTED, assistant=MaxGram())
    assert output.report.models["target"].fed >= 200


def test_two_threads_do_not_share():
    """Each has a reader of its own: texts are right, and each thread's next turn finds one that fits."""
    target, prompts, found = tiny("llama"), [tokens(300, seed) for seed in (1, 2)], {}
    barrier = threading.Barrier(2)

    def turns(name: int) -> None:
        prompt = prompts[name]
        for _ in range(3):
            barrier.wait()
            output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
            prompt = torch.cat([output.sequences, tokens(TURN, seed=name)], 1)
        found[name] = output

    threads = [threading.Thread(target=turns, args=(name,)) for name in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, output in found.items():
        prompt = output.sequences[:, :-ANSWER]
        assert torch.equal(output.sequences, target.generate(prompt, **WANTED).sequences), name
        assert output.report.models["target"].fed < TURN + 12 * ANSWER


def test_what_is_held_goes_when_it_is_released_and_with_its_model():
    one, other = fresh("llama", seed=1), fresh("llama", seed=2)
    for model in (one, other):
        model.generate(tokens(50), **WANTED, assistant=MaxGram())
    assert held(one) > 0
    assert held(one) + held(other) == held()
    assert csdraft.release(one) > 0
    assert held(one) == 0
    assert held(other) > 0
    del other, model
    gc.collect()
    assert held() == 0


def test_what_inference_mode_has_read_is_left_there():
    target, prompt = tiny("llama"), tokens(60)
    plain = target.generate(prompt, **WANTED).sequences
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            output = target.generate(prompt, **WANTED, assistant=ModelDrafter(drafter_of("llama")), schedule="fixed")
        assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_autocast_has_read_is_left_there(family):
    """Its keys and values are of another dtype."""
    target, prompt = fresh(family), tokens(60)
    plain = target.generate(prompt, **WANTED).sequences
    for on in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
        assert on or torch.equal(output.sequences, plain)


def test_a_batch_goes_on_too():
    target, inputs = tiny("llama"), ragged_batch((120, 40, 90))
    first = target.generate(**inputs, **WANTED, assistant=MaxGram(), schedule="fixed")
    ids = torch.cat([first.sequences, tokens(3 * TURN).view(3, TURN)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, ANSWER + TURN, dtype=torch.long)], 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = target.generate(**inputs, **WANTED, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(output.sequences, target.generate(**inputs, **WANTED).sequences)


def test_a_copied_drafter_has_readers_of_its_own():
    target, drafter = tiny("llama"), ModelDrafter(fresh("llama", seed=1))
    two_turns(target, drafter)
    report = two_turns(target, copy.deepcopy(drafter)).report
    assert all(use.fed < LONG for use in report.models.values())


@pytest.mark.parametrize("change", ["attention", "window", "dtype", "embeddings"])
def test_a_model_that_is_another_in_kind_gets_a_new_reader(change):
    """What a reader knows of its model is not asked again."""
    target, prompt = fresh("mistral" if change == "window" else "llama"), tokens(60)
    target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
    if change == "attention":
        target.set_attn_implementation("eager")
    elif change == "window":
        target.config.sliding_window = 4
        for layer in target.model.layers:
            layer.self_attn.sliding_window = 4
    elif change == "dtype":
        target.to(torch.float64)
    else:
        target.resize_token_embeddings(120)
        prompt = torch.cat([prompt, torch.tensor([[110, 118]])], 1)
    output = target.generate(prompt, **WANTED, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(output.sequences, target.generate(prompt, **WANTED).sequences)


def test_two_chats_in_turn_have_a_reader_each():
    target, texts = tiny("llama"), [tokens(200, seed) for seed in (5, 6)]
    for turn in range(3):
        for chat in (0, 1):
            output = target.generate(texts[chat], **WANTED, assistant=MaxGram(), schedule="fixed")
            assert turn == 0 or output.report.models["target"].fed < TURN + 12 * ANSWER
            texts[chat] = torch.cat([output.sequences, tokens(TURN, seed=10 * turn + chat)], 1)


def test_waiting_readers_hold_no_more_than_their_share(monkeypatch):
    """Who has waited longest goes; the latest stays, whatever it holds."""
    target = tiny("llama")
    target.generate(tokens(200, 5), **WANTED, assistant=MaxGram())
    one = held()
    for room, kept in ((4.5, 3), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr("csdraft.decoding.readers.memory_of", lambda device, room=room: room * one / 0.125)
        for seed in (6, 7, 8):
            target.generate(tokens(200, seed), **WANTED, assistant=MaxGram())
        assert held() <= max(room, 1) * one
        assert held() >= min(kept, 3) * one * 0.9
        csdraft.release()


def test_a_cache_of_the_users_own_comes_into_a_reader_that_has_read_trees():
    """The positions of an earlier tree say nothing about the keys and values that come in."""
    target, drafter = tiny("gemma3"), ModelDrafter(drafter_of("gemma3"), tree=BestFirst())
    asked = WANTED | {"assistant": drafter, "schedule": "fixed"}
    target.generate(tokens(40), **asked)
    prompt = tokens(50, seed=3)
    first = target.generate(prompt, **asked, **{GENERATE_CACHE: DynamicCache(config=target.config)})
    more = torch.cat([first.sequences, tokens(TURN, seed=4)], 1)
    second = target.generate(more, **asked, **{GENERATE_CACHE: first[GENERATE_CACHE]})
    assert torch.equal(first.sequences, target.generate(prompt, **WANTED).sequences)
    assert torch.equal(second.sequences, target.generate(more, **WANTED).sequences)


def test_where_one_cache_has_room_it_is_the_targets(monkeypatch):
    """The drafters' are dropped first: they cost less to read again."""
    monkeypatch.setattr("csdraft.decoding.readers.memory_of", lambda device: 0.0)
    target, small = tiny("llama"), drafter_of("llama")
    target.generate(tokens(20), **WANTED, assistant=ModelDrafter(small), schedule="fixed")
    assert held(target) > 0 == held(small)
