"""Forwards of fixed shape, recorded and replayed by a stand-in on the CPU: they take nothing from outside."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import csdraft
from csdraft import MaxGram, ModelDrafter
from csdraft.decoding.graphs import Graphs
from csdraft.decoding.inputs import Shape
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests.decoding.tape import recorder, stand_in
from tests.tiny import FAMILIES, fresh, tiny

RECORDED = [name for name, (_, kind, _) in FAMILIES.items() if "Conditional" not in kind and name != "falcon"]
PROMPTS = torch.tensor([[3, 14, 15, 9, 26, 5, 3, 14, 15], [0, 0, 8, 9, 7, 9, 3, 2, 3]])
MASK = (PROMPTS != 0).long()
WANTED = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def graphs(monkeypatch):
    """The stand-in takes the place of CUDA graphs; the recorded shapes of all readers."""
    yield from stand_in(monkeypatch)


def replays(monkeypatch) -> list[int]:
    """Counts replays."""
    count = [0]
    run = Graphs.run

    def counted(self, shape, body, at_once=False):
        count[0] += shape in self._replays
        return run(self, shape, body, at_once)

    monkeypatch.setattr(Graphs, "run", counted)
    return count


def drafters(family, target):
    return ModelDrafter(fresh(family, seed=1)), ModelDrafter(fresh(family, seed=1), tree=BestFirst()), MaxGram()


REPRESENTATIVE = ("llama", "gemma3", "gpt2")
"""Rotary positions, windows, a table of positions: the other families are slow tests."""
CASES = [*((family, 2) for family in RECORDED), ("llama", 1), ("gemma2", 1)]


@pytest.mark.parametrize(
    ("family", "rows"),
    [pytest.param(*case, marks=[] if case[0] in REPRESENTATIVE else pytest.mark.slow) for case in CASES],
)
def test_replayed_forwards_write_the_same_text(graphs, monkeypatch, family, rows):
    target, count = tiny(family), replays(monkeypatch)
    inputs = {"inputs": PROMPTS[:rows], "attention_mask": MASK[:rows]} | WANTED
    plain = target.generate(**inputs)
    for assistant in drafters(family, target):
        text = target.generate(**inputs, assistant=assistant, schedule="fixed")
        assert torch.equal(text, plain)
    assert not {reader.graphs.why_not for reader in graphs} - {None}
    assert count[0] > 20


def test_sampled_texts_are_the_same_too(graphs, monkeypatch):
    target, count = tiny("llama"), replays(monkeypatch)
    inputs = {"inputs": PROMPTS, "attention_mask": MASK} | WANTED | {"do_sample": True, "row_seeds": [5, 6]}
    for verifier in ("match", "rejection"):
        texts = [
            target.generate(
                **inputs, assistant=drafters("llama", target)[0], verifier=verifier, schedule="fixed", graphs=way
            )
            for way in ("auto", False)
        ]
        assert torch.equal(*texts)
    assert count[0] > 20


def test_what_a_model_brings_from_the_host_is_named_and_runs_eagerly(graphs):
    target = tiny("falcon")  # makes a tensor of a number in every forward
    plain = target.generate(PROMPTS[:1], **WANTED)
    assert torch.equal(target.generate(PROMPTS[:1], **WANTED, assistant=MaxGram()), plain)
    assert "a value passes between host and device" in graphs[0].graphs.why_not


def test_a_longer_text_moves_the_cache_and_what_was_recorded_goes(graphs, monkeypatch):
    target, count = tiny("llama"), replays(monkeypatch)
    for length in (9, 40, 170):
        prompt = torch.arange(3, 3 + length)[None] % 90 + 3
        plain = target.generate(prompt, **WANTED | {"max_new_tokens": 60})
        before = count[0]
        text = target.generate(prompt, **WANTED | {"max_new_tokens": 60}, assistant=MaxGram())
        assert torch.equal(text, plain)
        assert count[0] > before


def test_the_oldest_recording_makes_room(graphs, monkeypatch):
    monkeypatch.setattr("csdraft.decoding.graphs.MOST", 2)
    target, drafter = tiny("llama"), MaxGram()
    inputs = {"inputs": PROMPTS[:1], "attention_mask": MASK[:1]} | WANTED
    plain = target.generate(**inputs)
    for length in (1, 3, 7, 1, 3, 7):
        text = target.generate(**inputs, assistant=drafter, schedule=Fixed(length), reuse=False)
        assert torch.equal(text, plain)
    kept = [reader.graphs.shapes for reader in graphs if reader.graphs is not None]
    assert max(map(len, kept)) == 2
    assert all({shape.queries for shape in shapes} <= {1, 2, 4, 8} for shapes in kept)


def test_a_second_call_replays_at_once(graphs, monkeypatch):
    target, count = tiny("llama"), replays(monkeypatch)
    for _ in range(3):  # a shape is recorded when it is asked for the third time
        target.generate(PROMPTS[:1], **WANTED, assistant=MaxGram(), schedule="fixed", verifier="match")
    before = count[0]
    asked = WANTED | {"return_dict_in_generate": True}
    output = target.generate(PROMPTS[:1], **asked, assistant=MaxGram(), schedule="fixed", verifier="match")
    assert len(graphs) == 1
    assert count[0] - before >= output.report.target_calls
    assert output.report.models["target"].recorded == len(graphs[0].graphs.shapes)
    assert "recorded shapes of target took" in str(output.report)


@pytest.mark.slow
def test_modules_that_are_set_otherwise_are_recorded_anew(graphs, monkeypatch):
    """A recording would go on with an adapter that has been switched off, or without a hook that has been added."""
    rank = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted, count = get_peft_model(fresh("llama", seed=4), rank).eval(), replays(monkeypatch)
    layer, asked = adapted.base_model.model.model.layers[0].mlp, WANTED | {"inputs": PROMPTS[:1]}

    def check() -> list[int]:
        plain = adapted.generate(**asked)
        for _ in range(4):
            assert torch.equal(adapted.generate(**asked, assistant=MaxGram(), schedule="fixed"), plain)
        return plain.tolist()

    texts = [check()]
    with adapted.disable_adapter():
        texts.append(check())
    texts.append(check())
    hook = layer.register_forward_hook(lambda module, inputs, output: -3 * output)
    texts.append(check())
    hook.remove()
    texts.append(check())
    assert texts[0] == texts[2] == texts[4]
    assert len({str(text) for text in texts}) == 3
    assert count[0] > 20


def test_rows_that_end_leave_and_what_was_recorded_stays(graphs, monkeypatch):
    """Forwards get narrower at powers of two; the next batch replays what this one recorded."""
    target, count = tiny("llama"), replays(monkeypatch)
    prompts = (torch.arange(40).view(4, 10) * 7) % 90 + 3
    texts = target.generate(prompts, **WANTED)[:, 10:]
    ends = sorted({int(text[place]) for text, place in zip(texts, (3, 6, 12), strict=False)})
    asked = WANTED | {"eos_token_id": ends, "return_dict_in_generate": False}
    plain, drafter = target.generate(prompts, **asked), MaxGram()
    for _ in range(4):
        assert torch.equal(target.generate(prompts, **asked, assistant=drafter, schedule="fixed", reuse=False), plain)
    (reader,) = graphs
    assert len({shape.rows for shape in reader.graphs.shapes}) > 1
    recorded, before = len(reader.graphs.shapes), count[0]
    target.generate(prompts, **asked, assistant=drafter, schedule="fixed", reuse=False)
    assert len(graphs) == 1
    assert len(reader.graphs.shapes) == recorded
    assert set(reader.costs) == set(reader.graphs.shapes)
    assert count[0] > before


def test_none_are_made_where_they_are_not_wanted(graphs):
    tiny("llama").generate(PROMPTS, attention_mask=MASK, **WANTED, assistant=MaxGram(), graphs=False)
    tiny("t5").generate(PROMPTS, attention_mask=MASK, **WANTED, assistant=MaxGram())
    assert not graphs
    with pytest.raises(ValueError, match="graphs='always' is a str; it takes 'auto' or 'compile' or False"):
        tiny("llama").generate(PROMPTS, **WANTED, assistant=MaxGram(), graphs="always")


@pytest.mark.parametrize("fault", ["outside", "moved", "host"])
def test_the_stand_in_finds_what_a_graph_forbids(fault):
    buffer, other = torch.ones(4), torch.zeros(4)
    kept = [buffer]
    record = recorder(lambda: {tensor.untyped_storage().data_ptr() for tensor in kept})
    if fault == "outside":
        with pytest.raises(AssertionError, match="was made outside"):
            record(lambda: buffer + other)
    elif fault == "host":
        with pytest.raises(RuntimeError, match="passes between host and device"):
            record(lambda: buffer * float(buffer.sum()))
    else:
        replay = record(lambda: buffer + 1)
        buffer.add_(1)
        assert torch.equal(replay(), torch.full((4,), 3.0))
        kept[:] = [buffer.clone()]
        with pytest.raises(AssertionError, match="lies elsewhere"):
            replay()


def test_what_is_prepared_is_replayed_by_the_first_call(graphs, monkeypatch):
    target, drafter = tiny("llama"), ModelDrafter(fresh("llama", seed=1))
    said = []
    prepared = csdraft.prepare(target, drafter, rows=2, slots=300, progress=lambda what, share: said.append(share))
    assert [model.recorded for model in prepared.models] == [14, 14]  # widths to 64, of 256 and 512 slots
    assert not prepared.why_not_captured
    assert said[0] == 0
    assert said[-1] == 1
    assert "512" in str(prepared)
    assert "64 tokens" in str(prepared)
    count = replays(monkeypatch)
    inputs = {"inputs": PROMPTS, "attention_mask": MASK} | WANTED
    output = target.generate(
        **inputs, assistant=drafter, schedule="fixed", verifier="match", return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, target.generate(**inputs))
    assert len(graphs) == 2
    assert count[0] >= 2 * output.report.target_calls


def test_where_too_many_shapes_are_prepared_short_texts_keep_theirs(graphs, monkeypatch):
    monkeypatch.setattr("csdraft.decoding.graphs.MOST", 7)
    target = tiny("llama")
    ready = csdraft.prepare(target, slots=512, progress=lambda what, share: None).models[0]
    assert (len(ready.costs), ready.recorded) == (14, 7)
    (reader,) = graphs
    assert {shape.slots for shape in reader.graphs.shapes} == {256}


def test_a_text_as_long_as_was_prepared_for_keeps_what_was_recorded(graphs):
    target = tiny("llama")
    csdraft.prepare(target, slots=256, progress=lambda what, share: None)
    prompt = torch.arange(3, 203)[None] % 90 + 3
    text = target.generate(prompt, **WANTED | {"max_new_tokens": 40}, assistant=MaxGram(), schedule="fixed")
    assert torch.equal(text, target.generate(prompt, **WANTED | {"max_new_tokens": 40}))
    (reader,) = graphs
    assert {shape.queries for shape in reader.graphs.shapes} >= {1, 2, 4, 8, 16, 32, 64}


def test_a_model_with_fewer_positions_than_slots_is_prepared(graphs):
    target = tiny("gpt2")  # has 256 positions
    csdraft.prepare(target, slots=512, progress=lambda what, share: None)
    plain = target.generate(PROMPTS[:1], **WANTED)
    assert torch.equal(target.generate(PROMPTS[:1], **WANTED, assistant=MaxGram(), schedule="fixed"), plain)


def test_what_a_recording_frees_is_not_taken_off_its_bytes(monkeypatch):
    """Before it records, torch gives back what it holds without need."""
    needed, held = [100], [1000]

    def record(body):
        torch.cuda.empty_cache()
        needed[0], held[0] = needed[0] + 30, held[0] + 30
        return body

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.__setitem__(0, needed[0]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    graphs = Graphs(record, device=torch.device("cuda"))
    graphs.run(Shape(1, 1, 256), lambda: torch.zeros(1), at_once=True)
    assert graphs.bytes == 30


def test_without_graphs_forwards_are_timed():
    prepared = csdraft.prepare(tiny("llama"), slots=64, progress=lambda what, share: None)
    assert prepared.why_not_captured == {"LlamaForCausalLM": "no graphs on cpu"}
    assert all(seconds > 0 for seconds in prepared.models[0].costs.values())
    with pytest.raises(ValueError, match="rows=0"):
        csdraft.prepare(tiny("llama"), rows=0)
    csdraft.release()
