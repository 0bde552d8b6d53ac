"""Everything else of `generate` keeps its meaning when an assistant is given."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StopStringCriteria,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import csdraft
from csdraft import ModelDrafter
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.schedules.fixed import Fixed
from tests import tiny
from tests.tiny import EOS, PAD, Scripted

FIXED = {"schedule": Fixed(), "strict": True}
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny("llama")


def pair(model, inputs, wrong: float = 0.1, branches: int = 1, family: str = "llama", **options):
    """(plain, ours, report): the same call without and with an oracle that errs now and then."""
    options = GREEDY | options
    endless = {"stopping_criteria": None, "stop_strings": None, "return_dict_in_generate": False}
    told = model.generate(**inputs, **(options | endless))
    oracle = Scripted(tiny.continuations(told, inputs, family), wrong=wrong, branches=branches)
    wanted = model.generate(**inputs, **options)
    return wanted, model.generate(**inputs, **options, assistant=oracle, **FIXED)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.view(-1).tolist())

    def end(self) -> None:
        self.ended += 1


class Counter(LogitsProcessor):
    """Penalises what it has been called for: a processor with state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.tensor([self.calls % scores.shape[1]]), -9.0)


class AtLength(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] == self.length)


# Where a text ends.


@pytest.mark.parametrize("new", [pytest.param(1, marks=pytest.mark.drafts_nothing), 2, 7, 24])
def test_max_new_tokens_is_exact(model, new: int) -> None:
    wanted, ours = pair(model, tiny.prompt(), wrong=0.0, max_new_tokens=new)
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 20 + new


def test_a_criterion_that_is_met_inside_a_block_ends_the_text_there(model) -> None:
    criterion = AtLength(39)
    wanted, ours = pair(model, tiny.prompt(), wrong=0.0, stopping_criteria=[AtLength(39)])
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 39
    model.generate(**tiny.prompt(), **GREEDY, stopping_criteria=[criterion], assistant=tiny.drafter_of("llama"))
    assert criterion.seen == list(range(21, 40))  # asked once about every token, in order


@pytest.mark.parametrize("rows", [1, 4])
def test_end_of_text_inside_a_block(model, rows: int) -> None:
    inputs = tiny.inputs_of("llama", rows)
    told = model.generate(**inputs, **GREEDY)
    ends = [int(row[20 + 4 * i + 3]) for i, row in enumerate(told)]  # the rows end at different steps
    wanted, ours = pair(model, inputs, wrong=0.0, eos_token_id=ends)
    assert ours.tolist() == wanted.tolist()
    assert rows == 1 or (ours == PAD).any()


@pytest.mark.parametrize("where", ["keyword", "generation_config", "model"])
def test_stop_strings_end_the_text_where_they_do_in_plain_generate(where: str) -> None:
    model, tokenizer, inputs = tiny.fresh("llama"), tiny.tokenizer(), tiny.prompt()
    text = tokenizer.decode(model.generate(**inputs, **GREEDY)[0, 20:])
    options = {"tokenizer": tokenizer}
    if where == "keyword":
        options["stop_strings"] = [text[7:10]]
    elif where == "model":
        model.generation_config.stop_strings = [text[7:10]]
    else:
        options["generation_config"] = GenerationConfig(stop_strings=[text[7:10]], pad_token_id=PAD, **GREEDY)
    wanted, ours = pair(model, inputs, wrong=0.0, **options) if where != "model" else (None, None)
    if where == "model":
        wanted = model.generate(**inputs, **GREEDY, **options)
        ours = model.generate(**inputs, **GREEDY, **options, assistant=tiny.drafter_of("llama"), **FIXED)
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 20 + text.index(text[7:10]) + 3


def test_a_stop_string_criterion_of_ones_own_replaces_stop_strings(model) -> None:
    inputs, tokenizer = tiny.prompt(), tiny.tokenizer()
    text = tokenizer.decode(model.generate(**inputs, **GREEDY)[0, 20:])
    for own, other in ((text[3:5], text[9:11]), (text[9:11], text[3:5])):
        criteria = {"stopping_criteria": [StopStringCriteria(tokenizer, [own])]}
        options = {**inputs, **GREEDY, **criteria, "stop_strings": [other], "tokenizer": tokenizer}
        wanted = model.generate(**options)
        assert wanted.shape[1] == 20 + text.index(own) + 2
        assert model.generate(**options, assistant=tiny.drafter_of("llama"), **FIXED).tolist() == wanted.tolist()


@pytest.mark.drafts_nothing
def test_stop_strings_that_are_empty_do_what_they_do_in_plain_generate(model) -> None:
    options = {**tiny.prompt(), **GREEDY, "tokenizer": tiny.tokenizer()}
    assert model.generate(**options, stop_strings="").shape[1] == 21
    assert model.generate(**options, stop_strings="", assistant="auto").shape[1] == 21
    for assistant in (None, "auto"):
        with pytest.raises(ValueError, match="Stop string preprocessing"):
            model.generate(**options, stop_strings=[], assistant=assistant)


def test_arguments_by_position(model) -> None:
    ids, tokenizer = tiny.prompt()["input_ids"], tiny.tokenizer()
    strings = {"stop_strings": [tokenizer.decode(model.generate(ids, **GREEDY)[0, 30:32])], "tokenizer": tokenizer}
    for length, stops in ((25, {}), (25, strings), (60, strings)):
        given = ids, GenerationConfig(pad_token_id=PAD, **GREEDY), None, [MaxLengthCriteria(length)]
        wanted = model.generate(*given, **stops)
        assert wanted.shape[1] == min(length, 32)
        assert model.generate(*given, **stops, assistant=tiny.drafter_of("llama"), **FIXED).tolist() == wanted.tolist()
    nothing = [None] * 5
    with pytest.raises(ValueError, match="assistant= and assistant_model= are two ways"):
        model.generate(ids, *nothing, tiny.drafter_of("llama"), assistant="auto")
    with pytest.raises(TypeError, match="multiple values"):
        model.generate(ids, inputs=ids, assistant="auto")


def test_stop_strings_without_a_tokenizer_is_transformers_own_error(model) -> None:
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(**tiny.prompt(), stop_strings=["x"], assistant=tiny.drafter_of("llama"))


@pytest.mark.drafts_nothing
def test_a_prompt_that_is_longer_than_a_criterion_allows_still_gets_one_token(model) -> None:
    wanted, ours = pair(model, tiny.prompt(), stopping_criteria=[MaxLengthCriteria(5)])
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 21


def test_criteria_that_hold_locks_serve_a_batch(model) -> None:
    class Stopped(StoppingCriteria):
        def __init__(self) -> None:
            self.event, self.tokenizer, self.calls = threading.Event(), tiny.tokenizer(), 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            if self.calls == 9:
                self.event.set()
            return torch.full((len(input_ids),), self.event.is_set())

    output = model.generate(
        **tiny.inputs_of("llama", 4), **GREEDY, stopping_criteria=[Stopped()], assistant=tiny.drafter_of("llama")
    )
    assert output.shape[1] <= 20 + 9


def test_criteria_see_scores_when_they_are_returned(model) -> None:
    class Unsure(StoppingCriteria):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float]] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append((len(scores), float(scores[-1][0].max())))
            return torch.full((len(input_ids),), len(scores) == 13)

    options = {"return_dict_in_generate": True, "output_scores": True, **GREEDY}
    plain, ours = Unsure(), Unsure()
    wanted = model.generate(**tiny.prompt(), **options, stopping_criteria=[plain])
    oracle = Scripted([wanted.sequences[0].tolist()], wrong=0.3)
    got = model.generate(**tiny.prompt(), **options, stopping_criteria=[ours], assistant=oracle, **FIXED)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert [n for n, _ in ours.seen] == [n for n, _ in plain.seen] == list(range(1, 14))
    torch.testing.assert_close([x for _, x in ours.seen], [x for _, x in plain.seen], atol=1e-4, rtol=1e-4)


# Processors.


@pytest.mark.parametrize("rows", [1, 4])
def test_a_stateful_processor_is_called_once_per_emitted_token(model, rows: int) -> None:
    inputs = tiny.inputs_of("llama", rows)
    wanted = model.generate(**inputs, **GREEDY, logits_processor=[Counter()])
    oracle = Scripted(tiny.continuations(wanted, inputs), wrong=0.4, branches=3)
    counter = Counter()
    ours = model.generate(**inputs, **GREEDY, logits_processor=[counter], assistant=oracle, **FIXED)
    assert ours.tolist() == wanted.tolist()
    assert counter.calls == 24  # of a batch for all of its rows at once


@pytest.mark.parametrize("rows", [1, 4])
def test_prefix_constraints_are_told_their_row(model, rows: int) -> None:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [3 + row, 10 + int(ids[-1]) % 7 + 20 * row, 4 + len(ids) % 3]

    wanted, ours = pair(model, tiny.inputs_of("llama", rows), prefix_allowed_tokens_fn=allowed)
    assert ours.tolist() == wanted.tolist()
    drafted = {**GREEDY, "prefix_allowed_tokens_fn": allowed}
    by_model = model.generate(**tiny.inputs_of("llama", rows), **drafted, assistant=model, **FIXED)
    assert by_model.tolist() == wanted.tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_classifier_free_guidance_which_runs_the_model_itself(model, rows: int) -> None:
    inputs = tiny.inputs_of("llama", rows)
    negative = {"negative_prompt_ids": inputs["input_ids"][:, -2:], "guidance_scale": 1.7}
    wanted, ours = pair(model, inputs, **negative)
    assert ours.tolist() == wanted.tolist()


def test_processors_that_read_the_encoders_input_change_no_text() -> None:
    model, inputs = tiny.tiny("t5"), tiny.inputs_of("t5", 4)
    options = {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": EOS}
    wanted, ours = pair(model, inputs, family="t5", **options)
    assert ours.tolist() == wanted.tolist()


# What comes back.


def test_the_streamer_gets_the_prompt_then_token_by_token_then_the_end(model) -> None:
    plain, ours = Recorder(), Recorder()
    wanted = model.generate(**tiny.prompt(), **GREEDY, streamer=plain)
    oracle = Scripted([wanted[0].tolist()], wrong=0.2)
    model.generate(**tiny.prompt(), **GREEDY, streamer=ours, assistant=oracle, **FIXED)
    assert (ours.got, ours.ended) == (plain.got, plain.ended)


def test_a_text_iterator_streamer(model) -> None:
    streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True)
    options = {**tiny.prompt(), **GREEDY, "streamer": streamer, "assistant": tiny.drafter_of("llama")}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tiny.tokenizer().decode(model.generate(**tiny.prompt(), **GREEDY)[0, 20:])


def test_returned_dictionaries_have_plain_generates_fields(model) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = tiny.inputs_of("llama", 4)
    told = model.generate(**inputs, **GREEDY)
    wanted, ours = pair(model, inputs, eos_token_id=[int(told[1, 25]), int(told[0, 30])], **options)
    assert set(ours.keys()) == {*wanted.keys(), "report"}
    assert [s.shape for s in ours.scores] == [s.shape for s in wanted.scores]
    assert ours.scores[0].dtype == wanted.scores[0].dtype
    ended, compared = (wanted.sequences == PAD)[:, 20:].nonzero(), 0
    for row, step in ended[ended[:, 0].ne(9)].tolist():
        if wanted.sequences[row, 20 + step :].eq(PAD).all() and step > 12:
            assert ours.scores[step][row, PAD] == 0
            assert ours.scores[step][row].isneginf().sum() == tiny.VOCAB - 1
            compared += 1
    assert compared > 0


def test_num_return_sequences_samples_differing_texts_that_row_seeds_fix(model) -> None:
    options = {"do_sample": True, "temperature": 0.9, "num_return_sequences": 4, "max_new_tokens": 16}
    inputs = tiny.ragged_batch((9, 5))
    first = model.generate(**inputs, **options, row_seeds=range(8), assistant=tiny.drafter_of("llama"))
    again = model.generate(**inputs, **options, row_seeds=range(8), assistant=Scripted([[]] * 8, branches=2))
    other = model.generate(**inputs, **options, row_seeds=range(1, 9), assistant=tiny.drafter_of("llama"))
    assert first.shape[0] == 8
    assert len({tuple(row) for row in first.tolist()}) == 8
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_torch_manual_seed_governs_sampling(model) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(**tiny.prompt(), do_sample=True, max_new_tokens=16, assistant=model).tolist())
    assert texts[0] == texts[1] != texts[2]


# Ways to call.


def test_ids_of_32_bits_become_64_as_in_plain_generate(model) -> None:
    inputs = {name: value.int() for name, value in tiny.ragged_batch().items()}
    wanted, ours = pair(model, inputs)
    assert ours.dtype == wanted.dtype == torch.long
    assert ours.tolist() == wanted.tolist()


def test_logits_of_64_bits_are_compared_in_32() -> None:
    model = tiny.fresh("llama").double()
    told = model.generate(**tiny.prompt(), **GREEDY)[0, 20]
    with torch.no_grad():  # the token before it is as good in float32, and less good in float64
        head = model.get_output_embeddings().weight
        head[told - 1] = head[told] * (1 - 1e-12)
    wanted, ours = pair(model, tiny.prompt())
    assert ours.tolist() == wanted.tolist()
    assert wanted[0, 20] == told - 1


def test_without_an_assistant_nothing_changes(model) -> None:
    from csdraft.hook import _stock_generate

    for options in ({"do_sample": True}, {"num_beams": 3}, {"do_sample": False, "assistant": None}):
        torch.manual_seed(3)
        ours = model.generate(**tiny.prompt(), max_new_tokens=8, **options)
        torch.manual_seed(3)
        options.pop("assistant", None)
        assert ours.tolist() == _stock_generate(model, **tiny.prompt(), max_new_tokens=8, **options).tolist()


def test_a_typo_is_still_an_error(model) -> None:
    with pytest.raises(ValueError, match="asistant"):
        model.generate(**tiny.prompt(), asistant=tiny.drafter_of("llama"))


def test_a_generation_config_object(model) -> None:
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.5, do_sample=False, pad_token_id=PAD)
    before = copy.deepcopy(config.to_dict())
    wanted = model.generate(**tiny.prompt(), generation_config=config)
    ours = model.generate(**tiny.prompt(), generation_config=config, assistant=tiny.drafter_of("llama"), **FIXED)
    assert ours.tolist() == wanted.tolist()
    assert config.to_dict() == before


@pytest.mark.parametrize("spelling", ["positional", "inputs", "input_ids", "encoder_outputs"])
def test_how_an_encoder_decoder_gets_its_inputs(spelling: str) -> None:
    model, inputs = tiny.tiny("t5"), tiny.inputs_of("t5", 2)
    ids, mask = inputs.values()
    options = {"attention_mask": mask, **GREEDY}
    wanted = model.generate(ids, **options)
    args = (ids,) if spelling == "positional" else ()
    if spelling in ("inputs", "input_ids"):
        options[spelling] = ids
    if spelling == "encoder_outputs":
        options["encoder_outputs"] = model.get_encoder()(input_ids=ids, attention_mask=mask)
        options["encoder_input_ids"] = ids
    assistant = tiny.drafter_of("t5")
    assert model.generate(*args, **options, assistant=assistant, **FIXED).tolist() == wanted.tolist()


def test_a_pipeline_writes_the_same_text(model) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), device="cpu")
    options = {"do_sample": False, "max_new_tokens": 12}
    for text in ("hello there", ["hello", "good morning"]):
        assert generator(text, **options) == generator(text, assistant=tiny.drafter_of("llama"), **options)


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_peft_models_write_the_same_text(role: str) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.fresh("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.eval()
    target = adapted if role == "target" else tiny.tiny("llama")
    assistant = ModelDrafter(tiny.tiny("llama") if role == "target" else adapted)
    wanted = target.generate(**tiny.prompt(), **GREEDY)
    output = target.generate(**tiny.prompt(), **GREEDY, assistant=assistant, return_dict_in_generate=True, **FIXED)
    assert output.sequences.tolist() == wanted.tolist()
    assert 0 < output.report.acceptance_rate < 1  # the adapter counts, on whichever side it is


def test_the_spelling_through_custom_generate(model) -> None:
    from csdraft.hook import _stock_generate

    wanted = model.generate(**tiny.prompt(), **GREEDY)
    options = {"custom_generate": csdraft.decode, "assistant": tiny.drafter_of("llama")}
    assert model.generate(**tiny.prompt(), **GREEDY, **options).tolist() == wanted.tolist()
    assert _stock_generate(model, **tiny.prompt(), **GREEDY, **options).tolist() == wanted.tolist()
    recorder = Recorder()
    model.generate(**tiny.prompt(), **GREEDY, **options, streamer=recorder)
    assert len(recorder.got) == 25  # csdraft's generate gives it everything; the stock one drops the streamer
    plain = _stock_generate(model, **tiny.prompt(), **GREEDY, custom_generate=csdraft.decode)
    assert plain.tolist() == wanted.tolist()


UNPATCHED = """
import torch, transformers
stock = transformers.GenerationMixin.generate
import csdraft
from csdraft.schedules.fixed import Fixed
from tests import tiny
assert transformers.GenerationMixin.generate is stock
model, small, inputs = tiny.tiny("llama"), tiny.drafter_of("llama"), tiny.prompt()
wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
try:
    model.generate(**inputs, assistant=small)
    raise SystemExit("assistant= was accepted")
except ValueError as error:
    assert "assistant" in str(error)
try:
    stops = {"stop_strings": ["x"], "tokenizer": tiny.tokenizer()}
    model.generate(**inputs, custom_generate=csdraft.decode, assistant=small, **stops)
    raise SystemExit("stop strings were dropped in silence")
except ValueError as error:
    assert "stop strings" in str(error)
options = {"max_new_tokens": 8, "do_sample": False, "assistant": small}
assert model.generate(**inputs, **options, custom_generate=csdraft.decode).tolist() == wanted
import copy, pickle
from peft import LoraConfig, get_peft_model
other, before = tiny.fresh("llama"), None
before = set(vars(other))
assert csdraft.enable(other) is other
assert set(vars(other)) == before
for stranger in (model, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
    assert stranger.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == wanted
    try:
        stranger.generate(**inputs, assistant=small)
        raise SystemExit("assistant= was accepted by a model that was not enabled")
    except ValueError as error:
        assert "assistant" in str(error)
adapted = csdraft.enable(get_peft_model(tiny.fresh("llama"), LoraConfig(r=2, target_modules=["q_proj"])).eval())
assert adapted.generate(**inputs, **options).tolist() == wanted
assert other.generate(**inputs, **options).tolist() == wanted
assert other.generate(inputs["input_ids"], **options).tolist() == wanted
csdraft.install(); csdraft.install()
assert model.generate(**inputs, **options).tolist() == wanted
"""


@pytest.mark.slow
def test_the_environment_variable_and_enable(root) -> None:
    environment = {**os.environ, "CSDRAFT_NO_PATCH": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", UNPATCHED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The user's own cache.

CACHED = ["llama", "mistral", "gemma3", "t5"]


def own_cache(model, kind: str):
    if model.config.is_encoder_decoder:
        of = (lambda size: StaticCache(model.config, size)) if kind == "static" else lambda size: DynamicCache()
        return EncoderDecoderCache(of(72), of(tiny.inputs_of("t5", 1)["input_ids"].shape[1]))
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=72)
    return DynamicCache(config=model.config) if kind == "configured" else DynamicCache()


def spoken(family: str, output, inputs, more: torch.Tensor) -> dict:
    """The inputs of a next turn: all that was said, and `more`."""
    ids = torch.cat([output, more.expand(len(output), -1)], 1)
    mask = inputs["attention_mask"]
    new = (output[:, mask.shape[1] :] != PAD).long() if family != "t5" else (output != PAD).long()
    if family == "t5":
        new[:, 0] = 1
        seen = torch.cat([new, torch.ones_like(ids)[:, :3]], 1)
        return {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": seen}
    return {"input_ids": ids, "attention_mask": torch.cat([mask, new, torch.ones_like(ids)[:, :3]], 1)}


@pytest.mark.parametrize("kind", ["configured", "bare", "static"])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("family", CACHED)
def test_a_users_cache_is_filled_and_continued(family: str, rows: int, kind: str) -> None:
    """Three turns, each by plain generate or by ours, in every order: the texts are those of plain generate alone."""
    model, inputs = tiny.tiny(family), tiny.inputs_of(family, rows)
    if kind == "bare" and family in ("mistral", "gemma3"):
        pytest.skip("plain generate itself needs the config to window a cache")
    more = torch.tensor([[5, 50, 33]])
    # Rows that end apart leave padding inside the next turn's text; windows and relative positions do not allow that.
    ends = [EOS, 40, 70] if family == "llama" else None

    def talk(order: str) -> tuple[list, list]:
        cache, said, shapes = own_cache(model, kind), [], []
        turn = inputs
        for who in order:
            assistant = {} if who == "p" else {"assistant": tiny.drafter_of(family), **FIXED}
            options = {"do_sample": False, "max_new_tokens": 7, GENERATE_CACHE: cache, **assistant}
            output = model.generate(**turn, **options, eos_token_id=ends)
            said.append(output.tolist())
            halves = [cache.self_attention_cache, cache.cross_attention_cache] if family == "t5" else [cache]
            shapes.append(
                [(layer.keys.shape, int(layer.get_seq_length())) for half in halves for layer in half.layers]
            )
            turn = spoken(family, output, inputs, more)
        return said, shapes

    wanted = talk("ppp")
    for order in ("cpp", "pcp", "ccc"):
        assert talk(order) == wanted, order


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "t5"])
def test_the_returned_cache_holds_what_plain_generates_does(family: str) -> None:
    model, inputs = tiny.tiny(family), tiny.inputs_of(family, 3)
    told = model.generate(**inputs, **GREEDY)
    ends = {"eos_token_id": [int(told[0, -13]), int(told[1, -9])], "return_dict_in_generate": True}
    wanted, ours = pair(model, inputs, branches=2, family=family, **ends)
    assert ours.sequences.tolist() == wanted.sequences.tolist()
    halves = [(wanted[GENERATE_CACHE], ours[GENERATE_CACHE])]
    if family == "t5":
        halves = [(a.self_attention_cache, b.self_attention_cache) for a, b in halves]
        halves.append((wanted[GENERATE_CACHE].cross_attention_cache, ours[GENERATE_CACHE].cross_attention_cache))
    for plain, own in halves:
        assert type(own) is type(plain)
        for theirs, layer in zip(plain.layers, own.layers, strict=True):
            assert type(layer) is type(theirs)
            assert layer.keys.shape == theirs.keys.shape
            for row in range(len(told)):
                columns = torch.arange(layer.keys.shape[2])
                if plain is halves[0][0] and family != "t5":  # padding before the prompt does not count
                    kept = torch.ones_like(wanted.sequences[row], dtype=torch.bool)
                    kept[: inputs["attention_mask"].shape[1]] = inputs["attention_mask"][row].bool()
                    columns = kept[:-1][-layer.keys.shape[2] :].nonzero()[:, 0]
                for half in ("keys", "values"):
                    got, expected = (getattr(x, half)[row][:, columns] for x in (layer, theirs))
                    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_is_continued_from_its_returned_cache_without_a_mask(model) -> None:
    """Where padding is the end token, a mask cannot be inferred: the next turn sees the padding of rows that ended."""
    ids = tiny.prompt()["input_ids"] + torch.tensor([[0], [0], [1]])
    told = model.generate(ids, **GREEDY)
    end = int(told[2, -14])
    assert end in told[2]
    assert end not in told[0, -24:]
    texts, options = [], GREEDY | {"eos_token_id": end, "pad_token_id": end}
    for how in ({}, {"assistant": Scripted(told.tolist()), **FIXED}):
        said = model.generate(ids, **options, **how, return_dict_in_generate=True)
        turn = {"inputs": torch.cat([said.sequences, ids[:, :4]], 1), GENERATE_CACHE: said[GENERATE_CACHE]}
        texts.append(model.generate(**turn, **options).tolist())
    assert texts[1] == texts[0]


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_decoder_prompts_of_different_lengths(family: str) -> None:
    """Padded on the left, as for decoder-only models; relative positions do not count the padding."""
    model, inputs, started = tiny.tiny(family), tiny.inputs_of(family, 4), tiny.ragged_batch((6, 1, 4, 3))
    inputs |= {"decoder_input_ids": started["input_ids"], "decoder_attention_mask": started["attention_mask"]}
    wanted = model.generate(**inputs, **GREEDY)
    texts = [row[6 - n :].tolist() for row, n in zip(wanted, (6, 1, 4, 3), strict=True)]
    for assistant in (tiny.drafter_of(family), Scripted(texts, branches=3)):
        assert model.generate(**inputs, **GREEDY, assistant=assistant, **FIXED).tolist() == wanted.tolist()


def test_several_texts_of_an_encoder_decoder() -> None:
    model, inputs = tiny.tiny("flan"), tiny.inputs_of("flan", 2)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "row_seeds": range(6)}
    texts = [
        model.generate(**inputs, **options, assistant=assistant, **FIXED).tolist()
        for assistant in (tiny.drafter_of("flan"), Scripted([[]] * 6, branches=2))
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == 6


@pytest.mark.parametrize("wish", ["static", "hybrid"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "t5"])
def test_a_static_cache_is_a_wish_that_changes_no_text(family: str, wish: str) -> None:
    model, inputs = tiny.tiny(family), tiny.inputs_of(family, 3)
    options = GREEDY | {"cache_implementation": wish}
    wanted = model.generate(**inputs, **options)
    drafter = {"assistant": tiny.drafter_of(family), **FIXED}
    assert torch.equal(model.generate(**inputs, **options, **drafter), wanted)
    output = model.generate(**inputs, **options, **drafter, return_dict_in_generate=True)
    assert torch.equal(output.sequences, wanted)


def test_sampling_goes_on_alike_from_a_users_cache() -> None:
    model, inputs, options = tiny.tiny("llama"), tiny.inputs_of("llama", 3), {"do_sample": True, "max_new_tokens": 9}
    texts = []
    for cache in (None, DynamicCache()):
        if cache is not None:
            model.generate(**{k: v[:, :-2] for k, v in inputs.items()}, max_new_tokens=1, **{GENERATE_CACHE: cache})
        options |= {"row_seeds": [1, 2, 3], GENERATE_CACHE: cache, "assistant": tiny.drafter_of("llama")}
        texts.append(model.generate(**inputs, **options, **FIXED).tolist())
    assert texts[0] == texts[1]
