"""Targets and drafters that are not in one piece: dispatched, offloaded, or with weights in a few bits.

What a CPU can show: accelerate's hooks around every module, weights that are elsewhere until a forward needs them,
and linear layers without a weight of the model's dtype.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests import tiny

GREEDY = {"do_sample": False, "max_new_tokens": 10}
SAMPLED = {"do_sample": True, "max_new_tokens": 10, "temperature": 0.8, "row_seeds": [3, 1, 4]}
FIXED = {"schedule": Fixed(), "strict": True}


def hooked(model: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True, skip_keys=model._skip_keys_device_placement)


def offloaded(model: nn.Module, folder: Path) -> nn.Module:
    cpu_offload(model, torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    return model


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """The first half of the model stays on the CPU, the rest waits on disk."""
    places = {name: "disk" if i else "cpu" for i, (name, _) in enumerate(model.named_children())}
    keys = model._skip_keys_device_placement
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, skip_keys=keys)


def wholly_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    places = {name: "cpu" if name == "lm_head" else "disk" for name, _ in model.named_children()}
    keys = model._skip_keys_device_placement
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, skip_keys=keys)


def cascade(family: str, place=None, folder: Path = Path()) -> CascadeDrafter:
    small = tiny.drafter_of(family)
    if place is not None:
        small = place(copy.deepcopy(small), folder)
    return CascadeDrafter([small, MaxGram()], [[2, 4], [0, 3]])


@pytest.mark.parametrize("place", [hooked, offloaded, on_disk, wholly_on_disk])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow), "t5"])
def test_a_dispatched_target_writes_the_same(family: str, place, tmp_path: Path) -> None:
    inputs = tiny.inputs_of(family, 3)
    target = place(copy.deepcopy(tiny.tiny(family)), tmp_path)
    wanted = tiny.tiny(family).generate(**inputs, **GREEDY)
    assert target.generate(**inputs, **GREEDY, assistant=cascade(family), **FIXED).tolist() == wanted.tolist()
    drawn = [m.generate(**inputs, **SAMPLED, assistant=cascade(family), **FIXED) for m in (tiny.tiny(family), target)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("place", [hooked, offloaded, wholly_on_disk])
def test_a_dispatched_drafter_drafts_the_same(place, tmp_path: Path) -> None:
    inputs = tiny.inputs_of("llama", 3)
    whole, parts = (cascade("llama"), cascade("llama", place, tmp_path))
    options = {**GREEDY, **FIXED, "return_dict_in_generate": True}
    made = [tiny.tiny("llama").generate(**inputs, **options, assistant=drafter) for drafter in (whole, parts)]
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert made[0].report.levels == made[1].report.levels


def test_a_device_map_of_from_pretrained(tmp_path: Path) -> None:
    tiny.tiny("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert target.hf_device_map == places
    inputs = tiny.inputs_of("llama", 2)
    wanted = tiny.tiny("llama").generate(**inputs, **GREEDY)
    assert target.generate(**inputs, **GREEDY, assistant=cascade("llama"), **FIXED).tolist() == wanted.tolist()


def test_a_stored_drafter_goes_where_an_offloaded_target_computes(tmp_path: Path) -> None:
    tiny.drafter_of("llama").save_pretrained(tmp_path / "small")
    cascade("llama").save_pretrained(tmp_path / "cascade", target=tiny.tiny("llama"))
    target, inputs = offloaded(copy.deepcopy(tiny.tiny("llama")), tmp_path), tiny.inputs_of("llama", 2)
    wanted = tiny.tiny("llama").generate(**inputs, **GREEDY)
    for stored in ("small", "cascade"):
        output = target.generate(**inputs, **GREEDY, assistant=str(tmp_path / stored), **FIXED)
        assert output.tolist() == wanted.tolist()


MORE = {
    "chain": {"assistant": tiny.drafter_of("llama")},
    "tree": {"assistant": ModelDrafter(tiny.drafter_of("llama"), tree=BestFirst(3, 12))},
    "auto": {"assistant": "auto"},
    "processors": {"assistant": tiny.drafter_of("llama"), "repetition_penalty": 1.3, "min_new_tokens": 4},
    "one's own": {"assistant": tiny.drafter_of("llama"), "logits_processor": [lambda ids, scores: scores / 2]},
}


@pytest.mark.parametrize("way", [{**GREEDY, "row_seeds": None}, SAMPLED])
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_another_default_device_changes_nothing(more, way) -> None:
    """Such as CUDA while the model is on the CPU. On the meta device no tensor has values: each slip is an error."""
    target, inputs = tiny.fresh("llama"), tiny.inputs_of("llama", 3)
    wanted = target.generate(**inputs, **way, **more, **FIXED)
    for _ in range(2):
        with torch.device("meta"):
            output = target.generate(**inputs, **way, **more, **FIXED)
        assert output.tolist() == wanted.tolist()


class Int8(nn.Module):
    """A linear layer whose weight is eight bits an entry and a scale a row, as weight-only quantisation makes them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("bits", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.bits.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised(model: nn.Module) -> nn.Module:
    """A copy with all linear layers but the output in eight bits."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, Int8(module))
    return copied


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_quantised_target_writes_the_same(family: str) -> None:
    target, small = quantised(tiny.tiny(family)), quantised(tiny.drafter_of(family))
    inputs = tiny.inputs_of(family, 3)
    wanted = target.generate(**inputs, **GREEDY)
    for drafter in (cascade(family), CascadeDrafter([small, MaxGram()], [[2, 4], [0, 3]])):
        output = target.generate(**inputs, **GREEDY, assistant=drafter, **FIXED, return_dict_in_generate=True)
        assert output.sequences.tolist() == wanted.tolist()
        assert output.report.acceptance_rate > 0.2
