"""What a model's code does decides, not its config's fields; what cannot be exact is refused for a true reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.generation import StoppingCriteria

from csdraft import MaxGram, ModelDrafter
from csdraft.checks import probe
from csdraft.checks.refusals import refusal
from csdraft.decoding.traits import CHUNKED, FULL, SLIDING, Span, traits_of
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.tiny import PAD, VOCAB, Scripted

LLAMA4 = tiny.COMMON | {
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,
    "num_local_experts": 2,
    "attention_chunk_size": 12,
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
}
LEFT_OVER = {
    "a window": {"sliding_window": 8},
    "a window and layer types": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
    "a chunk": {"attention_chunk_size": 8},
    "layer types alone": {"layer_types": ["full_attention"] * 2},
    "rotary axes": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
}


def same_text(model: nn.Module, inputs: dict[str, torch.Tensor], new: int = 26) -> None:
    """Chain, tree, a model and the model itself as drafters: each text is plain generate's."""
    options = {**inputs, "max_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
    wanted = model.generate(**options)
    texts = tiny.continuations(wanted, inputs)
    assistants = [Scripted(texts, wrong=0.3), Scripted(texts, wrong=0.3, branches=3), MaxGram(), model]
    assistants.append(ModelDrafter(model, depth=4, tree=BestFirst(nodes=9)))
    for assistant in assistants:
        ours = model.generate(**options, assistant=assistant, schedule="fixed", strict=True)
        assert ours.tolist() == wanted.tolist(), assistant


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("fields", LEFT_OVER.values(), ids=LEFT_OVER)
def test_fields_that_the_code_ignores(fields: dict, rows: int) -> None:
    """A Llama that was a Mistral; plain generate's cache heeds the window that its masks do not."""
    same_text(tiny.fresh("llama", **fields), tiny.inputs_of("llama", rows))


@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama"])
def test_a_decoder_that_a_user_derived_is_of_its_family(family: str) -> None:
    """Masks, windows and rotary code stand in the class that it is derived from, in another file."""
    model = tiny.fresh(family, seed=4)
    traits, inputs = traits_of(model), tiny.ragged_batch((30, 12))
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    decoder = model.get_decoder()
    decoder.__class__ = type("Derived", (type(decoder),), {"__module__": __name__})
    model.__class__ = type("DerivedForCausalLM", (type(model),), {"__module__": __name__})
    assert traits_of(model) == traits
    assert torch.equal(model.generate(**inputs, assistant=MaxGram(), strict=True, max_new_tokens=16), plain)


def test_windows_of_some_layers_that_the_code_ignores() -> None:
    model = tiny.fresh("llama", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(ValueError, match="its code makes no mask for"):
        model.generate(**tiny.prompt(), max_new_tokens=5, assistant=MaxGram())


@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_attention_is_decoded_with(rows: int) -> None:
    config = transformers.Llama4TextConfig(**LLAMA4)
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    assert traits_of(model).spans == {CHUNKED: Span(chunk=12), FULL: Span()}
    same_text(model, tiny.inputs_of("llama", rows))


def test_what_each_mask_sees_is_known() -> None:
    window = Span(window=tiny.WINDOW)
    assert traits_of(tiny.tiny("llama")).spans == {None: Span()}
    assert traits_of(tiny.tiny("mistral")).spans == {None: window}
    assert traits_of(tiny.tiny("gemma3")).spans == {FULL: Span(), SLIDING: window}
    assert traits_of(tiny.fresh("llama", sliding_window=8)).cache_windows == {8}
    assert traits_of(tiny.fresh("mistral", sliding_window=8)).cache_windows == frozenset()


# Vision-language models with text alone.

CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
CLIP |= {"patch_size": 4}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
IMAGE = {"image_token_index": 90}
PLACES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
SEEING = {
    "Gemma3": {
        "text_config": tiny.COMMON | {"head_dim": 8, "sliding_window": 16},
        "vision_config": CLIP,
        "mm_tokens_per_image": 4,
        **IMAGE,
    },
    "Llava": {
        "text_config": tiny.COMMON | {"model_type": "llama"},
        "vision_config": CLIP | {"model_type": "clip_vision_model", "projection_dim": 16},
        **IMAGE,
    },
    "Mistral3": {
        "text_config": tiny.COMMON | {"model_type": "mistral"},
        "vision_config": CLIP | {"model_type": "pixtral"},
        **IMAGE,
    },
    "Qwen2VL": {"text_config": tiny.COMMON | AXES, "vision_config": VISION, **PLACES},
}


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("family", SEEING)
def test_text_to_models_that_also_see(family: str, rows: int) -> None:
    config = getattr(transformers, f"{family}Config")(**SEEING[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    assert probe.difference(model) is None
    same_text(model, tiny.inputs_of("llama", rows))


def test_an_image_is_named_with_who_gave_it() -> None:
    config = transformers.LlavaConfig(**SEEING["Llava"])
    model = transformers.LlavaForConditionalGeneration(config).eval()
    inputs = tiny.prompt() | {"pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"comes from pixel_values, passed to generate"):
        model.generate(**inputs, max_new_tokens=4, assistant=MaxGram())


def test_an_input_that_generate_adds_is_not_blamed_on_the_user(monkeypatch) -> None:
    model = tiny.fresh("llama")
    expand = model._expand_inputs_for_generation

    def adds(**inputs):
        ids, inputs = expand(**inputs)
        return ids, inputs | {"tone": torch.ones(1), "moods": {}, "nothing": torch.empty(0)}

    monkeypatch.setattr(model, "_expand_inputs_for_generation", adds)
    with pytest.raises(ValueError, match=r"input tone \(a tensor of shape \(1,\)\) is added by generate"):
        model.generate(**tiny.prompt(), max_new_tokens=4, assistant=MaxGram())


# The context's end.


class AtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= self.length)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_no_draft_reaches_past_the_last_position(family: str, rows: int) -> None:
    """The text ends two tokens before the model's last position, by a criterion of the user's."""
    limit = {"n_positions": 64} if family == "gpt2" else {"max_position_embeddings": 64}
    model = tiny.fresh(family, **limit)
    inputs = tiny.inputs_of(family, rows)
    options = {**inputs, "max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
    options["stopping_criteria"] = [AtLength(62)]
    wanted = model.generate(**options)
    assert wanted.shape[1] == 62
    texts = tiny.continuations(wanted, inputs)
    for assistant in (Scripted(texts, depth=9), Scripted(texts, branches=3), MaxGram(), ModelDrafter(model)):
        assert (
            model.generate(**options, assistant=assistant, schedule="fixed", strict=True).tolist() == wanted.tolist()
        )


# No cache, and attention of a model's own.


def test_gradient_checkpointing_in_training_mode() -> None:
    model = tiny.fresh("llama")
    model.gradient_checkpointing_enable()
    model.train()
    options = {**tiny.prompt(), "max_new_tokens": 4, "assistant": tiny.drafter_of("llama"), "schedule": "fixed"}
    with pytest.raises(ValueError, match=r"model\.eval\(\) or model\.gradient_checkpointing_disable\(\)"):
        model.generate(**options)
    assert model.eval().generate(**options).shape[1] == 24


class Forgetful(transformers.LlamaForCausalLM):
    """Reads each forward as if it were the first."""

    def forward(self, *args, position_ids=None, cache=None, past_key_values=None, **kwargs):
        del cache, past_key_values
        return super().forward(*args, position_ids=position_ids, **kwargs | {"use_cache": False})


class BySlot(transformers.LlamaForCausalLM):
    """Masks by slot inside its own code, as families with a mask buffer did: what it is given is not looked at."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            queries, slots = attention_mask.shape[-2:]
            lower = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
            attention_mask = lower.expand(len(input_ids), 1, queries, slots)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class Counting(transformers.LlamaForCausalLM):
    """Counts positions itself, from the slots that are filled."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        cache = next(value for name, value in kwargs.items() if name in ("cache", "past_key_values"))
        start = 0 if cache is None else cache.get_seq_length()
        position_ids = torch.arange(start, start + input_ids.shape[1])[None]
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("model_class", [Forgetful, BySlot, Counting])
def test_a_class_that_would_write_another_text_is_refused(model_class: type) -> None:
    torch.manual_seed(0)
    model = model_class(tiny.tiny("llama").config).eval()
    with pytest.raises(ValueError, match=model_class.__name__):
        model.generate(**tiny.prompt(), max_new_tokens=5, assistant=MaxGram())


def test_an_unknown_class_is_asked_once(monkeypatch) -> None:
    class Renamed(transformers.LlamaForCausalLM):
        pass

    asked = []
    compare = probe._compare
    monkeypatch.setattr(probe, "_compare", lambda model: asked.append(model) or compare(model))
    for _ in range(2):
        model = Renamed(tiny.tiny("llama").config).eval()
        assert probe.difference(model) is None
        assert probe.difference(model) is None
    assert len(asked) == 1
    assert probe.difference(Renamed(transformers.LlamaConfig(**tiny.COMMON | {"hidden_size": 16})).eval()) is None
    assert len(asked) == 2


@pytest.mark.parametrize("shape", [(16, 16), (1, 1, 16, 16)], ids=["2D", "4D"])
def test_a_table_of_what_sees_what_is_refused_if_it_has_a_window(shape: tuple[int, ...]) -> None:
    model, all_earlier = tiny.fresh("llama"), torch.ones(shape, dtype=torch.bool).tril()
    model.register_buffer("bias", all_earlier)
    assert refusal(model) is None
    model.register_buffer("bias", all_earlier.triu(-7))
    assert "a table of its own" in str(refusal(model))


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_known_families_would_pass(family: str, monkeypatch) -> None:
    """Those that are not asked are asked here."""
    monkeypatch.setattr(probe, "KNOWN_EXACT", frozenset())
    for attention in tiny.attentions(family):
        assert probe.difference(tiny.fresh(family, attention=attention)) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [("lfm2", "layers of type conv, whose state cannot be rolled back"), ("bloom", "takes no position_ids")],
)
def test_a_model_is_refused_for_this_reason(family: str, reason: str) -> None:
    assert reason in (refusal(tiny.fresh(family)) or "")


# Wrappers.


@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.slow
def test_wrapped_models_draft_and_are_drafted_for() -> None:
    """Each shape costs seconds to compile; after two of them the rest runs as it is written."""
    model = tiny.fresh("mistral", num_hidden_layers=1)
    options = {**tiny.prompt(), "max_new_tokens": 8, "do_sample": False}  # each new shape is compiled anew
    wanted = model.generate(**options)
    compiled = torch.compile(model, backend="eager")
    for assistant in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        drafted = compiled.generate(**options, assistant=assistant, schedule="fixed", strict=True)
        assert drafted.tolist() == wanted.tolist()
    model.model = torch.compile(model.model, backend="eager")
    assert traits_of(model).spans == {None: Span(window=tiny.WINDOW)}
    assert model.generate(**options, assistant=model, schedule="fixed", strict=True).tolist() == wanted.tolist()
    assert model.config.vocab_size == VOCAB
