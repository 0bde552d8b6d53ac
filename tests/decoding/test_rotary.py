"""Models whose rotary factors change at a text length: the text is plain generate's on both sides of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.decoding.rotary import RotaryFactors
from csdraft.decoding.text import Text
from csdraft.decoding.traits import Switch, traits_of
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.tiny import PAD, Scripted

SWITCH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
FAMILIES = {
    "llama": {"rope_parameters": LONGROPE},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None},
}
ASSISTANTS = ["none", "chain", "tree", "model", "itself", "grown", "cascade"]


@cache
def longrope(family: str) -> nn.Module:
    """A tiny model of the family that reads texts above SWITCH tokens with other factors."""
    model = tiny.fresh(family, max_position_embeddings=128, **FAMILIES[family])
    model.generation_config.eos_token_id = None
    return model


def inputs_of(case: str) -> dict[str, torch.Tensor]:
    """Prompts around the switch: below, just at it, above; ragged; all rows padded."""
    lengths = {"short": (20,), "at": (SWITCH,), "past": (SWITCH + 5,), "ragged": (24, 9, 17), "padded": (24, 9, 17)}
    inputs = tiny.ragged_batch(lengths[case])
    if case != "padded":
        return inputs
    grown = {"input_ids": PAD, "attention_mask": 0}
    return {name: nn.functional.pad(value, (3, 0), value=grown[name]) for name, value in inputs.items()}


@cache
def disturbed(model: nn.Module) -> nn.Module:
    """`tiny.noisy`, made once."""
    return tiny.noisy(model)


@cache
def plain(family: str, case: str) -> torch.Tensor:
    """What plain `generate` writes."""
    return longrope(family).generate(**inputs_of(case), max_new_tokens=30, do_sample=False)


def assistant_of(kind: str, model: nn.Module, texts: list[list[int]]):
    noisy = disturbed(model)
    return {
        "none": lambda: Scripted(texts, depth=1, wrong=1.0),
        "chain": lambda: Scripted(texts, wrong=0.2),
        "tree": lambda: Scripted(texts, wrong=0.3, branches=3),
        "model": lambda: ModelDrafter(noisy),
        "itself": lambda: ModelDrafter(model, depth=4),
        "grown": lambda: ModelDrafter(noisy, depth=4, tree=BestFirst(nodes=9)),
        "cascade": lambda: CascadeDrafter([noisy, MaxGram()], [[3, 6], [0, 3]]),
    }[kind]()


@pytest.mark.parametrize("kind", ASSISTANTS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("short", marks=pytest.mark.slow),
        "at",
        "past",
        "ragged",
        pytest.param("padded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_plain_generates_across_the_switch(family: str, case: str, kind: str) -> None:
    model, inputs = longrope(family), inputs_of(case)
    options = {**inputs, "max_new_tokens": 30, "do_sample": False}
    wanted = plain(family, case)
    assistant = assistant_of(kind, model, tiny.continuations(wanted, inputs))
    ours = model.generate(**options, assistant=assistant, schedule="fixed", strict=True, return_dict_in_generate=True)
    assert ours.sequences.tolist() == wanted.tolist()
    if kind in ("chain", "tree"):
        assert ours.report.block_efficiency > 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_matter(family: str) -> None:
    """The text is another one without the switch: otherwise these tests would prove nothing."""
    model, inputs = longrope(family), inputs_of("short")
    options = {**inputs, "max_new_tokens": 30, "do_sample": False}
    unswitched = tiny.fresh(family, **(FAMILIES[family] | {"rope_parameters": {"rope_type": "default"}}))
    unswitched.load_state_dict(model.state_dict())
    assert model.generate(**options).tolist() != unswitched.generate(**options, eos_token_id=None).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_code_does_at_the_switch(family: str) -> None:
    assert traits_of(longrope(family)).switch == Switch(SWITCH, rereads=family == "phi3")


def test_room_ends_where_one_forward_would_mix_factors() -> None:
    rows = [Text(torch.arange(3, 27)), Text(torch.arange(27), torch.tensor([0] * 9 + [1] * 18))]
    factors = RotaryFactors(Switch(SWITCH), rows[:1])
    assert [factors.room(0, length) for length in (24, 31, 32)] == [8, 1, 0]
    assert factors.room(0, 33) > 1000  # all of it is read with the factors for long texts
    factors = RotaryFactors(Switch(SWITCH), [Text(torch.arange(27)), rows[1]])
    assert factors.room(1, 18) == SWITCH - 27  # the longest row of the batch decides


def test_dynamic_factors_are_refused_where_they_would_change() -> None:
    model = tiny.fresh("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    inputs = tiny.prompt(20)
    with pytest.raises(ValueError, match=r"dynamic NTK.*max_length=256"):
        model.generate(**inputs, max_new_tokens=300, assistant=MaxGram())
    options = {**inputs, "max_new_tokens": 40, "do_sample": False}
    ours = model.generate(**options, assistant=MaxGram(), schedule="fixed")
    assert ours.tolist() == model.generate(**options).tolist()


def test_a_chunked_prefill_would_read_with_other_factors() -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size=8"):
        longrope("llama").generate(**tiny.prompt(20), max_new_tokens=4, assistant=MaxGram(), prefill_chunk_size=8)
