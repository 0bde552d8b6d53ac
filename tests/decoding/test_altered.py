"""Models that are not as their class makes them: asked before they are decoded, whatever is known of the class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from csdraft import MaxGram
from csdraft.checks import probe
from csdraft.checks.altered import alterations
from csdraft.checks.probe import difference
from csdraft.decoding.traits import traits_of
from tests import tiny

OPTIONS = {"max_new_tokens": 16, "do_sample": False}


def louder(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Acts on generated tokens only, as steering hooks do that go by the length of what is read."""
    return output * 1.5 if output.shape[1] == 1 else output


def shift(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + 0.5


class Mean(nn.Module):
    """Takes the mean over all tokens that it is given out of them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - x.mean(1, keepdim=True)


def hooked(model: nn.Module) -> None:
    model.model.layers[0].mlp.register_forward_hook(louder)


def hooked_before(model: nn.Module) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: louder(module, (), args[0]))


def hooked_and_moved(model: nn.Module) -> None:
    """accelerate's own hook around a forward that somebody has put in place."""
    from accelerate import cpu_offload

    wrapped(model)
    cpu_offload(model, torch.device("cpu"))


def wrapped(model: nn.Module) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        if kwargs["input_ids"].shape[1] == 1:
            output.logits = output.logits + torch.arange(tiny.VOCAB) % 7
        return output

    model.forward = forward


def wrapped_inside(model: nn.Module) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = MethodType(lambda self, x: louder(self, (), type(self).forward(self, x)), mlp)


def replaced(model: nn.Module) -> None:
    model.model.layers[0].mlp = Mean(model.model.layers[0].mlp)


def replaced_in_class(model: nn.Module) -> None:
    made = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("LlamaMLP", (made,), {"forward": Mean.forward, "__module__": __name__})
    model.model.layers[0].mlp.inner = made(model.config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (hooked, "a forward hook on model.layers.0.mlp"),
        (hooked_before, "a forward pre-hook on model.layers.0.mlp"),
        (hooked_and_moved, "a forward of its own on LlamaForCausalLM"),
        (wrapped, "a forward of its own on LlamaForCausalLM"),
        (wrapped_inside, "a forward of its own on model.layers.1.mlp"),
        (replaced, "a module of class Mean on model.layers.0.mlp"),
        (replaced_in_class, "a module of class LlamaMLP on model.layers.0.mlp"),
    ],
)
def test_a_model_that_would_write_another_text_is_refused(change: Callable, named: str) -> None:
    model = tiny.fresh("llama")
    assert difference(model) is None
    change(model)
    with pytest.raises(ValueError, match=rf"{named}.*call generate without assistant="):
        model.generate(**tiny.prompt(), **OPTIONS, assistant=MaxGram())


def test_of_an_encoder_decoder_too() -> None:
    model, inputs = tiny.fresh("t5"), tiny.inputs_of("t5", 2)
    model.decoder.block[0].layer[-1].register_forward_hook(shift)
    assert difference(model) is None
    model.decoder.block[0].layer[-1].register_forward_hook(louder)
    with pytest.raises(ValueError, match=r"a forward hook on decoder\.block\.0\.layer\.2"):
        model.generate(**inputs, **OPTIONS, assistant=MaxGram())


def test_a_hook_on_all_modules_at_once() -> None:
    model = tiny.fresh("llama")
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: louder(module, args, output) if type(module).__name__ == "LlamaMLP" else None
    )
    try:
        assert "a forward hook on all modules" in str(difference(model))
    finally:
        handle.remove()
    assert difference(model) is None


class Through(transformers.LlamaForCausalLM):
    """Names none of the arguments that it passes on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Around(transformers.LlamaPreTrainedModel, transformers.GenerationMixin):
    """Around a model of another class, none of whose arguments it names."""

    def __init__(self, config):
        super().__init__(config)
        self.inner = transformers.LlamaForCausalLM(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def passed_on(config) -> nn.Module:
    model = transformers.LlamaForCausalLM(config)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


@pytest.mark.parametrize("make", [Through, Around, passed_on])
def test_a_forward_that_passes_on_what_it_is_given(make: Callable) -> None:
    torch.manual_seed(0)
    model, inputs = make(tiny.tiny("llama").config).eval(), tiny.inputs_of("llama", 3)
    assert traits_of(model).keeps_logits
    wanted = model.generate(**inputs, **OPTIONS)
    assert model.generate(**inputs, **OPTIONS, assistant=MaxGram(), schedule="fixed").tolist() == wanted.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_hook_on_all_tokens_alike_is_decoded_with(family: str) -> None:
    model, inputs = tiny.fresh(family), tiny.inputs_of(family, 3)
    list(model.modules())[-3].register_forward_hook(shift)
    wanted = model.generate(**inputs, **OPTIONS)
    assert model.generate(**inputs, **OPTIONS, assistant=MaxGram(), schedule="fixed").tolist() == wanted.tolist()


def test_an_answer_lasts_as_long_as_the_changes(monkeypatch) -> None:
    """Of the same model, and never that of another model of the class."""
    model, other, asked = tiny.fresh("llama"), tiny.fresh("llama"), []
    compare = probe._compare
    monkeypatch.setattr(probe, "_compare", lambda model: asked.append(model) or compare(model))

    def answers(asking: nn.Module) -> tuple[list[bool], int]:
        """Whether it is refused, each of two times, and how often a model was asked for it."""
        before = len(asked)
        return [difference(asking) is not None for _ in range(2)], len(asked) - before

    assert answers(model) == ([False, False], 0)
    model.model.norm.register_forward_hook(shift)
    assert answers(model) == ([False, False], 1)
    hooked(model)
    assert answers(model) == ([True, True], 1)
    assert answers(other) == ([False, False], 0)
    hooked(other)
    assert answers(other) == ([True, True], 1)
    other.model.layers[0].mlp._forward_hooks.clear()
    assert answers(other) == ([False, False], 0)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """accelerate's, in bfloat16; a process has one state of it, which a training before this test may have set."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_as_their_classes_make_them(accelerator, family: str) -> None:
    """They are known by their class, with what libraries put on them to place, cast and capture too."""
    from accelerate import cpu_offload
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.fresh(family)
    assert alterations(model) == []
    model.enable_input_require_grads()
    inputs = tiny.inputs_of(family, 1)
    model.generate(**inputs, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    inject_adapter_in_model(LoraConfig(target_modules="all-linear"), model)
    model = accelerator.prepare_model(model)
    assert alterations(model) == []
    cpu_offload(model, torch.device("cpu"))
    assert alterations(model) == []


def test_every_known_class_is_as_it_is_made() -> None:
    """At the size that its config has by default, without weights."""
    for name in sorted(probe.KNOWN_EXACT):
        model_class = getattr(transformers, name)
        with torch.device("meta"):
            model = model_class(model_class.config_class(num_hidden_layers=1))
        assert alterations(model) == [], name
