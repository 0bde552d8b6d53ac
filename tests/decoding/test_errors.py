"""Limits are errors, not surprises: each names the value, the expectation and the way out, before any model runs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, StaticCache
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from csdraft import CascadeDrafter, Drafter, Horizontal, MaxGram, ModelDrafter, Vertical
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.draft import Draft
from csdraft.drafters.auto import Auto
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.merged import Merged
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.drafters.reference import Reference
from csdraft.drafters.translated import Translated
from csdraft.schedules.fixed import Fixed
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.documents import DocumentTable
from tests import tiny
from tests.tiny import Scripted


@pytest.fixture
def forwards():
    """Counts the forwards of all models that a test uses."""

    class Count:
        total = 0

        def watch(self, model):
            hooks.append(model.register_forward_pre_hook(lambda *_: setattr(self, "total", self.total + 1)))
            return model

    hooks: list = []
    yield Count()
    for hook in hooks:
        hook.remove()


def refused(forwards, match: str, family: str = "llama", model=None, inputs=None, **options) -> str:
    """The message; and no model has run."""
    model = forwards.watch(model if model is not None else tiny.tiny(family))
    options = {"max_new_tokens": 5, "do_sample": False, "assistant": Scripted([[]] * 9), **options}
    with pytest.raises(ValueError, match=match) as caught:
        model.generate(**(tiny.prompt() if inputs is None else inputs), **options)
    assert forwards.total == 0
    return str(caught.value)


class Silent(BaseStreamer):
    def put(self, value) -> None:
        pass

    def end(self) -> None:
        pass


# What is asked of generate.

MODES = {
    "beam search": ({"num_beams": 2}, "unset num_beams"),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, "unset num_beams"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "unset penalty_alpha"),
    "DoLa": ({"dola_layers": "high"}, "unset dola_layers"),
    "constraints": ({"num_beams": 2, "force_words_ids": [[5]]}, "beam"),
}


@pytest.mark.parametrize("mode", MODES)
def test_other_generation_modes_are_refused(forwards, mode: str) -> None:
    options, name = MODES[mode]
    message = refused(forwards, name, **options)
    assert "greedy search and sampling" in message
    assert "assistant=" in message


def test_flags_that_drafted_decoding_has_no_use_for(forwards) -> None:
    assert "unset use_cache" in refused(forwards, "use_cache=False", use_cache=False)
    message = refused(forwards, "cache_implementation='quantized'", cache_implementation="quantized")
    assert "unset cache_implementation" in message
    message = refused(forwards, "output_attentions", output_attentions=True, return_dict_in_generate=True)
    assert "unset output_attentions" in message
    assert "gather" in refused(forwards, "synced_gpus=True", synced_gpus=True)
    assert "encoder's mask" in refused(forwards, "prefill_chunk_size=6", "t5", prefill_chunk_size=6)


def test_two_ways_to_draft_at_once(forwards) -> None:
    refused(forwards, "two ways to draft; drop one", assistant_model=tiny.drafter_of("llama"))
    message = refused(forwards, "another way to draft", prompt_lookup_num_tokens=3, num_return_sequences=2)
    assert "unset prompt_lookup_num_tokens" in message


def test_a_streamer_takes_one_row(forwards) -> None:
    refused(forwards, "this batch has 4", inputs=tiny.inputs_of("llama", 4), streamer=Silent())


def test_row_seeds_are_one_a_row(forwards) -> None:
    refused(forwards, "2 seeds for 6 rows", row_seeds=[1, 2], num_return_sequences=6, do_sample=True)


def test_names_that_do_not_exist(forwards) -> None:
    assert "match" in refused(forwards, "mach", verifier="mach")
    assert "fixed" in refused(forwards, "fixt", schedule="fixt")
    assert "csdraft.Drafter" in refused(forwards, "assistant=3 is an int", assistant=3)
    assert len(refused(forwards, r"assistant=\[Llama(.|\n)*\.\.\. is a list", assistant=[tiny.tiny("llama")])) < 400


# Inputs.


def test_empty_prompts_are_refused(forwards) -> None:
    ids = torch.zeros(1, 0, dtype=torch.long)
    refused(forwards, "prompt is empty|must be|empty", inputs={"input_ids": ids, "attention_mask": ids})


def test_embeddings_and_token_types_are_refused(forwards) -> None:
    embeddings = tiny.tiny("llama").get_input_embeddings()(tiny.prompt()["input_ids"])
    assert "assistant=" in refused(forwards, "inputs_embeds", inputs={"inputs_embeds": embeddings})
    inputs = tiny.prompt()
    refused(forwards, "token_type_ids", "gpt2", inputs={**inputs, "token_type_ids": inputs["attention_mask"] * 0})


def test_padding_on_the_right_is_refused(forwards) -> None:
    message = refused(forwards, "row 1 is padded on the right", inputs=tiny.ragged_batch((9, 4), side="right"))
    assert "padding_side" in message


def test_a_row_of_padding_alone_is_refused(forwards) -> None:
    inputs = tiny.ragged_batch((9, 4))
    inputs["attention_mask"][1] = 0
    refused(forwards, "row 1's attention_mask has no 1", inputs=inputs)


def test_masks_of_another_length_or_of_other_values(forwards) -> None:
    ids = tiny.prompt()["input_ids"]
    for length in (15, 22):
        inputs = {"input_ids": ids, "attention_mask": torch.ones(1, length, dtype=torch.long)}
        refused(forwards, rf"attention_mask has shape \(1, {length}\), input_ids \(1, 20\)", inputs=inputs)
    for odd in (2, 0.5, -1):  # plain generate counts positions by summing the mask
        inputs = {"input_ids": ids, "attention_mask": torch.full((1, 20), odd)}
        refused(forwards, f"attention_mask has the value {odd}; give 1", inputs=inputs)


def test_masked_tokens_inside_a_row(forwards) -> None:
    inputs = tiny.prompt()
    inputs["attention_mask"][0, 7] = 0
    for family in ("mistral", "gemma3"):
        assert "left" in refused(forwards, "row 0 has masked tokens between", family, inputs=inputs)
    model = tiny.tiny("llama")
    options = {"max_new_tokens": 9, "do_sample": False}
    ours = model.generate(**inputs, **options, assistant=tiny.drafter_of("llama"), strict=True)
    assert ours.tolist() == model.generate(**inputs, **options).tolist()  # full attention does not mind


def test_positions_of_the_users_own(forwards) -> None:
    inputs = tiny.prompt()
    usual = torch.arange(20)[None]
    refused(forwards, "position_ids", inputs={**inputs, "position_ids": usual + 3})
    model, options = tiny.tiny("llama"), {"max_new_tokens": 5, "do_sample": False, "assistant": Scripted([[]])}
    model.generate(**inputs, **options, position_ids=usual, strict=True)


def test_rows_that_may_end_apart_without_a_pad_token(forwards) -> None:
    class Ends:
        """Says that it ends texts by a token, for which plain `generate` pads the rows that have ended."""

        eos_token_id = 5

        def __call__(self, ids, scores, **kwargs):
            return ids[:, -1] == 5

    model = tiny.fresh("llama", pad_token_id=None, eos_token_id=None)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    options = {"inputs": tiny.inputs_of("llama", 2), "model": model, "stopping_criteria": [Ends()]}
    assert "set pad_token_id" in refused(forwards, "pad_token_id is None", **options)


# The user's cache.


def test_caches_that_cannot_be_taken_over(forwards) -> None:
    cache = Cache(layers=[type("OwnLayer", (DynamicLayer,), {})() for _ in range(2)])
    assert "DynamicCache" in refused(forwards, "Cache whose layers", **{GENERATE_CACHE: cache})
    cache = StaticCache(config=tiny.tiny("mistral").config, max_cache_len=4)  # shorter than its window
    assert "give it max_cache_len=" in refused(
        forwards, "max_cache_len=4", model=tiny.tiny("mistral"), **{GENERATE_CACHE: cache}
    )
    cache = StaticCache(config=tiny.tiny("llama").config, max_cache_len=20)
    assert "give it max_cache_len=" in refused(forwards, "max_cache_len=20", **{GENERATE_CACHE: cache})


def test_a_cache_without_its_text(forwards) -> None:
    model, inputs, cache = tiny.tiny("llama"), tiny.prompt(), DynamicCache()
    with torch.no_grad():
        model(**inputs, **{GENERATE_CACHE: cache})
    for new in (1, 20):
        ids = inputs["input_ids"][:, -new:]
        message = refused(forwards, "holds 20 tokens", inputs={"input_ids": ids}, **{GENERATE_CACHE: cache})
        assert "whole text" in message
    longer = torch.ones(1, 23, dtype=torch.long)
    inputs = {"input_ids": inputs["input_ids"][:, :3], "attention_mask": longer}
    refused(forwards, "holds 20 tokens", inputs=inputs, **{GENERATE_CACHE: cache})


# Models.

WHY = {
    "lfm2": "conv",
    "mamba": "state",
    "bloom": "position_ids",
    "alibi": "ALiBi",
    "umt5": "in those of mt5 and t5 only",
    "bart": "in those of mt5 and t5 only",
}


@pytest.mark.parametrize("family", WHY)
def test_models_that_cannot_be_rolled_back_or_placed(forwards, family: str) -> None:
    model = tiny.fresh(family)
    if model.config.is_encoder_decoder:  # generate runs the encoder before it hands over
        with pytest.raises(ValueError, match=WHY[family]):
            model.generate(**tiny.prompt(), max_new_tokens=3, assistant=Scripted([[]]))
    else:
        assert type(model).__name__ in refused(forwards, WHY[family], model=model)
    kind = "t5" if model.config.is_encoder_decoder else "llama"
    with pytest.raises(ValueError, match=WHY[family]):
        tiny.tiny(kind).generate(**tiny.prompt(), max_new_tokens=3, assistant=model)


def test_attention_that_takes_no_mask(forwards) -> None:
    model = tiny.fresh("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "set_attn_implementation" in refused(forwards, "flash_attention_2", model=model)


def test_adapters_of_virtual_tokens_are_refused(forwards) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    adapted = get_peft_model(tiny.fresh("llama"), config)
    assert "LoRA" in refused(forwards, "virtual tokens", model=adapted)


@pytest.mark.parametrize("name", ["_sample", "_prefill", "_update_model_kwargs_for_generation"])
def test_a_class_that_decodes_in_a_way_of_its_own(forwards, name: str) -> None:
    """Such as those of model repositories; drafted decoding does not call these methods."""
    model = tiny.fresh("llama")
    stock, inner = type(model), getattr(type(model), name)
    model.__class__ = type("Own", (stock,), {name: lambda *args, **more: inner(*args, **more)})
    model.generate(**tiny.prompt(), max_new_tokens=2)
    assert "leave assistant= out" in refused(forwards, f"Own has a {name} of its own", model=model)


# Drafters.


def test_a_vocabulary_of_another_size(forwards) -> None:
    small = forwards.watch(tiny.fresh("llama", vocab_size=1500))
    message = refused(forwards, "1500", assistant=small)
    assert "97" in message
    assert "tokenizer" in message


def test_a_few_padding_rows_in_the_vocabulary_are_no_reason() -> None:
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    for own in (tiny.VOCAB + 15, tiny.VOCAB - 15):
        torch.manual_seed(5)
        small, model = tiny.fresh("llama", vocab_size=own), tiny.tiny("llama")
        wanted = model.generate(**tiny.prompt(), **options)
        assert wanted.max() >= tiny.VOCAB - 15, "the drafter meets no token that it lacks"
        ours = model.generate(**tiny.prompt(), **options, assistant=small, schedule=Fixed(), strict=True)
        assert ours.tolist() == wanted.tolist()


def test_a_decoder_for_an_encoder_decoder_and_the_other_way_round(forwards) -> None:
    assert "alike" in refused(forwards, "encoder-decoder", assistant=tiny.fresh("t5"))
    with pytest.raises(ValueError, match="decoder-only"):
        tiny.tiny("t5").generate(**tiny.prompt(), max_new_tokens=3, assistant=tiny.tiny("llama"))


def test_a_drafter_model_that_cannot_read_the_source() -> None:
    model, inputs = tiny.tiny("t5"), tiny.inputs_of("t5", 2)
    encoded = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="encoder_input_ids="):
        model.generate(**encoded, max_new_tokens=3, assistant=tiny.drafter_of("t5"))
    model.generate(**encoded, max_new_tokens=3, assistant=Scripted([[]] * 2), strict=True)


def test_cascades_that_are_none() -> None:
    model = tiny.tiny("llama")
    with pytest.raises(ValueError, match=r"k_matrix\[1\]\[0\]=2"):
        CascadeDrafter([model, model], k_matrix=[[1, 1], [2, 1]])
    with pytest.raises(ValueError, match=r"lenience=0.5 must be 1"):
        CascadeDrafter([model], k_matrix=3, lenience=0.5)
    with pytest.raises(ValueError, match=r"lenience=\[2.0\] with k_matrix='auto': give one number"):
        CascadeDrafter([model], k_matrix="auto", lenience=[2.0])
    with pytest.raises(ValueError, match="at least one drafter"):
        CascadeDrafter([])
    with pytest.raises(ValueError, match="depth=0"):
        ModelDrafter(model, depth=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Horizontal(("max_gram",), (4,)),  # type: ignore[arg-type]
        lambda: Merged((MaxGram(), "max_gram")),  # type: ignore[arg-type]
        lambda: Vertical(tiny.tiny("llama"), "max_gram"),  # type: ignore[arg-type]
        lambda: Ouroboros("max_gram"),  # type: ignore[arg-type]
    ],
)
def test_parts_that_are_no_drafters(make) -> None:
    with pytest.raises(ValueError, match=r"got 'max_gram' for a drafter; give an object, such as MaxGram\(\)"):
        make()
    with pytest.raises(ValueError, match="Merged got a LlamaForCausalLM for a drafter"):
        Merged((tiny.tiny("llama"),))  # type: ignore[arg-type]


OTHERS = (3, None, object(), {4: 5}, b"x", float("nan"), torch.tensor(1.0), torch.nn.Linear(2, 2))
"""Values that are neither a model nor a list of anything."""


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ModelDrafter, r"model=.* is an? \w+; give a transformers model, its path or Hub id"),
        (lambda value: Vertical(value, MaxGram()), r"reviewer=.* is an? \w+; give a transformers model"),
        (CascadeDrafter, r"drafters=.*; give a list"),
        (Merged, r"drafters=.* is an? \w+; give a list"),
        (lambda value: Horizontal(value, (2,)), r"drafters=.* is an? \w+; give a list"),
        (lambda value: Horizontal((MaxGram(),), value), r"lengths=.* is an? \w+; give a list"),
        (lambda value: Translated(MaxGram(), value, "unread"), r"tokenizer=.* is an? \w+; give a tokenizer"),
        (lambda value: Translated(value, "unread", "unread"), r"Translated got an? \w+ for a drafter"),
        (Datastore, r"corpus=.* of Datastore is an? \w+; give csdraft.tables' CorpusIndex, or its path"),
        (
            lambda value: MaxGram(bigram=value or 7),
            r"bigram=.* of MaxGram is an? \w+; give",
        ),
        (lambda value: Auto(outputs=value or 7), r"outputs=.* of Auto is an? \w+; give csdraft.tables' OutputTable"),
    ],
)
def test_values_of_another_kind(make, message, value) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(value)


NO_DOCUMENTS = (
    3,
    None,
    [1, 2],
    [[1, 2], 3],
    [["a"]],
    [[[1]]],
    [{1: 2}],
    [b"a"],
    [[1.5]],
    torch.tensor([1, 2]),
    torch.tensor(3),
)


@pytest.mark.parametrize("documents", NO_DOCUMENTS, ids=str)
def test_documents_that_are_none(documents) -> None:
    with pytest.raises(
        ValueError, match=r"(documents=.* is an? \w+; give|document \d is an? \w+, .*; give token ids)"
    ):
        Reference(documents)


def test_a_class_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"corpus=.* of Datastore is a type; give"):
        Datastore(CorpusIndex)  # type: ignore[arg-type]


class Rows:
    """A data set that has rows by number alone."""

    def __getitem__(self, number: int) -> list[int]:
        return [[1, 2], [3]][number]

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("documents", [[[1, 2], [3]], ((1, 2), (3,)), [torch.tensor([1, 2]), np.array([3])], Rows()])
def test_documents_of_all_kinds(documents) -> None:
    made = Reference(documents).documents
    assert isinstance(made, DocumentTable)
    assert made.tokens == [1, 2, 3]


def test_lists_of_all_kinds(tmp_path) -> None:
    model = tiny.tiny("llama")
    parts = {"a": MaxGram(), "b": MaxGram()}
    for given in (list(parts.values()), tuple(parts.values()), parts.values(), iter(parts.values())):
        assert Merged(given).drafters == tuple(parts.values())  # type: ignore[arg-type]
    for lengths in ([1, 2], (1, 2), np.array([1, 2]), range(1, 3)):
        assert Horizontal(tuple(parts.values()), lengths).depth == 3  # type: ignore[arg-type]
    assert CascadeDrafter(parts.values(), k_matrix=3).drafters == tuple(parts.values())  # type: ignore[arg-type]
    assert ModelDrafter(torch.nn.DataParallel(model)).network is model
    assert Vertical(torch.nn.DataParallel(model), MaxGram()).reviewer is model
    DocumentTable([[1, 2]]).save(tmp_path / "table.safetensors")
    assert Reference(tmp_path / "table.safetensors").documents.tokens == [1, 2]  # type: ignore[union-attr]


def test_past_the_drafters_context_decoding_goes_on() -> None:
    model, small = tiny.tiny("gpt2"), tiny.fresh("gpt2", n_positions=26, max_position_embeddings=26)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    ours = model.generate(**tiny.prompt(), **options, assistant=small, schedule=Fixed(), strict=True)
    assert ours.tolist() == model.generate(**tiny.prompt(), **options).tolist()


# What goes wrong on the way.


class Broken(Drafter):
    def __init__(self, draft) -> None:
        self.draft = draft

    def propose(self, contexts, budgets):
        return [self.draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (lambda c, b: 1 / 0, "ZeroDivisionError"),
        (lambda c, b: Draft.chain([tiny.VOCAB]), "vocabulary has 97"),
        (lambda c, b: Draft.chain([-1]), "vocabulary has 97"),
        (lambda c, b: Draft.chain([5] * (b.room + 1)), "its room was"),
    ],
)
def test_a_drafter_that_fails_costs_speed_only(draft, says: str) -> None:
    model, options = tiny.tiny("llama"), {"max_new_tokens": 9, "do_sample": False, "schedule": Fixed()}
    wanted = model.generate(**tiny.prompt(), max_new_tokens=9, do_sample=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = model.generate(**tiny.prompt(), **options, assistant=Broken(draft))
    assert ours.tolist() == wanted.tolist()
    assert any(says in str(warning.message) and "strict=True" in str(warning.message) for warning in caught)
    with pytest.raises((ValueError, ZeroDivisionError)):
        model.generate(**tiny.prompt(), **options, assistant=Broken(draft), strict=True)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers(do_sample: bool) -> None:
    model = tiny.fresh("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        model.generate(**tiny.prompt(), max_new_tokens=5, do_sample=do_sample, assistant=Scripted([[]]))


class Forbid(LogitsProcessor):
    """Forbids every token once the text has 23."""

    def __call__(self, ids, scores):
        return scores.fill_(-torch.inf) if ids.shape[1] == 23 else scores


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{"suppress_tokens": list(range(tiny.VOCAB))}, {"logits_processor": [Forbid()]}])
def test_nothing_is_left_to_draw(rows: int, options: dict) -> None:
    """As in plain generate, an error; the argmax of nothing would be token 0."""
    options = {**tiny.inputs_of("llama", rows), "max_new_tokens": 9, "do_sample": True, **options}
    with pytest.raises(RuntimeError, match="probability tensor"):
        tiny.tiny("llama").generate(**options)
    with pytest.raises(ValueError, match=r"no token can be drawn.*let them allow some"):
        tiny.tiny("llama").generate(**options, assistant=MaxGram(), schedule="fixed")
    with pytest.raises(ValueError, match="processors forbid every token and renormalize_logits"):
        tiny.tiny("llama").generate(**options, assistant=MaxGram(), schedule="fixed", renormalize_logits=True)


def test_block_is_refused_with_a_processor_that_may_keep_state() -> None:
    class Counting(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    model = tiny.tiny("llama")
    options = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0, "assistant": MaxGram(), "verifier": "block"}
    with pytest.raises(ValueError, match=r"Block.*Counting.*match"):
        model.generate(**tiny.prompt(), logits_processor=[Counting()], **options)
