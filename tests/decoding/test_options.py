"""Every option and keyword of `generate` is carried, without effect, or refused by its name; none is lost."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

import csdraft
from csdraft import MaxGram
from csdraft.checks.generate_options import CARRIED, REFUSED, WITHOUT_EFFECT
from csdraft.hook import OTHER_DRAFTERS
from tests import tiny

CARRIED_KEYWORDS = {
    "self",
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "kwargs",
}
HANDLED_KEYWORDS = {"synced_gpus", "custom_generate"}

ASKS = {
    "use_mtp": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "token_healing": True,
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "cache_implementation": "quantized",
}
"""Of each refused option a value that asks for something; the rest cannot be set in this transformers."""

HARMLESS = {
    "assistant_confidence_threshold": 0.2,
    "num_assistant_tokens": 7,
    "assistant_lookbehind": 5,
    "target_lookbehind": 5,
    "max_matching_ngram_size": 3,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "early_stopping": True,
    "prefill_chunk_size": 6,
    "disable_compile": True,
    "output_attentions": True,
    "output_hidden_states": True,
}
"""The last two ask for something with `return_dict_in_generate` only."""


def test_every_option_of_this_transformers_is_known() -> None:
    """A new one must be put in one of the lists, by whether plain `generate` writes another text for it."""
    options = vars(GenerationConfig()).keys()
    assert options - (CARRIED | WITHOUT_EFFECT | REFUSED.keys()) == set()
    assert not CARRIED & WITHOUT_EFFECT
    assert not (CARRIED | WITHOUT_EFFECT) & REFUSED.keys()


def test_every_keyword_of_this_transformers_is_known() -> None:
    keywords = set(inspect.signature(GenerationMixin.generate).parameters)
    assert keywords - CARRIED_KEYWORDS - HANDLED_KEYWORDS - set(OTHER_DRAFTERS) == set()


def asked_by(place: str, model, name: str, value) -> dict:
    """The options of a call in which `name` is set as a keyword, in a config, or in the model's own config."""
    options = {**tiny.prompt(), "max_new_tokens": 6}
    if place == "keyword":
        return options | {name: value}
    if place == "config":
        return options | {"generation_config": GenerationConfig(**{name: value}, pad_token_id=0)}
    setattr(model.generation_config, name, value)
    return options


@pytest.mark.parametrize("place", ["keyword", "config", "the model's config"])
@pytest.mark.parametrize("name", ASKS)
def test_what_is_refused_is_named(name: str, place: str) -> None:
    model = tiny.fresh("llama")
    options = asked_by(place, model, name, ASKS[name])
    if name == "penalty_alpha":
        options["top_k"] = 4
    options |= {"tokenizer": tiny.tokenizer()} if name == "token_healing" else {}
    model.generation_config.return_dict_in_generate = name in HARMLESS
    with pytest.raises(ValueError, match=f"{name}={ASKS[name]!r}.*unset {name}"):
        model.generate(**options, assistant=MaxGram())
    if name not in ("token_healing", "use_mtp", "assistant_early_exit", "cache_implementation"):
        with pytest.raises(ValueError, match=name):
            model.generate(**options, custom_generate=csdraft.decode)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_has_no_effect_on_plain_generate_has_none_here(name: str) -> None:
    model = tiny.tiny("llama")
    options = {**tiny.prompt(), "max_new_tokens": 12, "do_sample": False, name: HARMLESS[name]}
    assert (
        model.generate(**options, assistant=MaxGram(), schedule="fixed").tolist() == model.generate(**options).tolist()
    )


@pytest.mark.drafts_nothing
def test_an_option_of_a_newer_transformers_is_refused(monkeypatch) -> None:
    init = GenerationConfig.__init__

    def newer(self, **options):
        init(self, **options)
        self.think_twice = options.get("think_twice")

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    model = tiny.fresh("llama")
    assert model.generate(**tiny.prompt(), max_new_tokens=4, assistant=MaxGram()).shape[1] == 24
    with pytest.raises(ValueError, match=r"think_twice=2.*does not know"):
        model.generate(**tiny.prompt(), generation_config=GenerationConfig(think_twice=2), assistant=MaxGram())


def test_what_takes_the_tokenizer_reaches_decoding() -> None:
    model, tokenizer, inputs = tiny.fresh("llama"), tiny.tokenizer(), tiny.prompt()
    told = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    strings = [tokenizer.decode(told[0, 27:29])]
    options = {**inputs, "max_new_tokens": 20, "do_sample": False, "tokenizer": tokenizer}
    wanted = model.generate(**options, stop_strings=strings)
    assert wanted.shape[1] < told.shape[1]
    for given in ({"stop_strings": strings}, {"generation_config": GenerationConfig(stop_strings=strings)}, {}):
        model.generation_config.stop_strings = None if given else strings
        ours = model.generate(**options, **given, assistant=tiny.drafter_of("llama"), schedule="fixed")
        assert torch.equal(ours[:, : wanted.shape[1]], wanted)
        assert ours.shape == wanted.shape
