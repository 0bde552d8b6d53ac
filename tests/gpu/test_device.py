"""What must hold on an accelerator, held on the CPU too: `make gpu` runs the CUDA half, `make slow` the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csdraft
from csdraft import CascadeDrafter, Drafter, MaxGram, ModelDrafter, Vertical
from csdraft.cli._models import Opened
from csdraft.cli.check import greedy
from csdraft.decoding.chain import draft_chain
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.decoding.sampling import Sampler
from csdraft.schedules.fixed import Fixed
from tests import tiny

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
FIXED = {"schedule": Fixed(), "strict": True}
GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLED = {"do_sample": True, "max_new_tokens": 20, "temperature": 0.8, "top_k": 30, "row_seeds": [3, 1, 4]}
PENALIZED = GREEDY | {"repetition_penalty": 1.3, "min_new_tokens": 6}
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative; two devices' logarithms may differ in their last bits."""

pytestmark = pytest.mark.parametrize("device", DEVICES)


@cache
def placed(
    family: str, device: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[nn.Module, ...]:
    """Target, and two drafters that are often right."""
    models = tiny.tiny(family, attention), tiny.drafter_of(family, attention), tiny.drafter_of(family, attention, 0.2)
    return tuple(copy.deepcopy(model).to(device, dtype) for model in models)


@cache
def twin(family: str, device: str) -> nn.Module:
    """A copy of the better drafter, made once so that its forwards are recorded once."""
    return copy.deepcopy(placed(family, device)[1])


def moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def drafters(medium: nn.Module, small: nn.Module) -> dict[str, Drafter]:
    """Drafts drawn on the device, on the host, reviewed, and all of them together."""
    return {
        "model": ModelDrafter(small, depth=4),
        "max_gram": MaxGram(),
        "vertical": Vertical(medium, ModelDrafter(small, depth=3), depth=6),
        "cascade": CascadeDrafter([medium, small, MaxGram()], [[3, 4, 5], [0, 2, 3], [0, 0, 4]], lenience=2.0),
    }


# Greedy identity.


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_greedy_texts_are_plain_generates(device: str, family: str, rows: int) -> None:
    """In float32 token for token, one row and a ragged batch."""
    target, medium, small = placed(family, device)
    inputs = moved(tiny.inputs_of(family, rows), device)
    wanted = target.generate(**inputs, **GREEDY)
    for name, drafter in drafters(medium, small).items():
        output = target.generate(**inputs, **GREEDY, assistant=drafter, **FIXED)
        assert output.device.type == device
        assert output.tolist() == wanted.tolist(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_low_precision_leaves_the_text_at_near_ties_only(device: str, attention: str, dtype: torch.dtype) -> None:
    """The analysis of `csdraft check`: no token lies further below the best logit than rounding can explain."""
    target, medium, small = placed("llama", device, dtype, attention)
    for seed, name in ((0, "model"), (1, "cascade")):
        opened = Opened(target, tiny.tokenizer(), drafters(medium, small)[name], {"schedule": Fixed()})
        outcome = greedy(opened, moved(tiny.prompt(seed=seed), device), 32, name)
        assert outcome.passed, outcome


# Randomness.


def test_the_noise_is_the_cpus(device: str) -> None:
    """Bit for bit before the logarithms, in the last bits after them."""
    vocab = 50_000
    here, there = (Sampler(False, [3, 2**61 + 5], vocab) for _ in range(2))
    for row, position in ((0, 0), (0, 4097), (1, 77)):
        uniforms = [s.hashed([(row, position)], torch.device(d))[0].cpu() for s, d in ((here, "cpu"), (there, device))]
        assert torch.equal(*uniforms)
        noise = [s.log_exponential(row, position, torch.device(d)).cpu() for s, d in ((here, "cpu"), (there, device))]
        torch.testing.assert_close(*noise, rtol=ROUNDING, atol=ROUNDING)


def test_draws_are_the_cpus(device: str) -> None:
    """The same distribution, the same seed, the same token."""
    distribution = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    here, there = (Sampler(False, [7], 1000) for _ in range(2))
    for position in range(500):
        draws = [
            int((distribution.to(d) - s.log_exponential(0, position, torch.device(d))).argmax())
            for s, d in ((here, "cpu"), (there, device))
        ]
        assert draws[0] == draws[1]


def test_sampled_text_does_not_depend_on_the_drafter(device: str) -> None:
    target, medium, small = placed("llama", device)
    inputs = moved(tiny.inputs_of("llama", 3), device)
    alone = target.generate(**inputs, **SAMPLED, custom_generate=csdraft.decode)
    assert len({tuple(row) for row in alone.tolist()}) == 3
    for name, drafter in drafters(medium, small).items():
        assert target.generate(**inputs, **SAMPLED, assistant=drafter, **FIXED).tolist() == alone.tolist(), name


@pytest.mark.parametrize("verifier", ["rejection", "block"])
def test_rules_with_distributions_run(device: str, verifier: str) -> None:
    """Distributions stay on the device and meet there; greedy texts are plain generate's under these rules too."""
    target, medium, small = placed("llama", device)
    inputs = moved(tiny.inputs_of("llama", 3), device)
    wanted = target.generate(**inputs, **GREEDY)
    for name in ("model", "cascade"):
        drafter = drafters(medium, small)[name]
        output = target.generate(**inputs, **GREEDY, assistant=drafter, verifier=verifier, **FIXED)
        assert output.tolist() == wanted.tolist(), name
        drawn = [target.generate(**inputs, **SAMPLED, assistant=drafter, verifier=verifier, **FIXED) for _ in "ab"]
        assert torch.equal(*drawn)


# Drafting on the device.


@dataclass(frozen=True, eq=False)
class Both(Drafter):
    """Drafts without looking at a token before the last is drawn, and step by step with a twin."""

    model: nn.Module
    twin: nn.Module
    lengths: list[int] = field(default_factory=list)

    def models(self) -> list[object]:
        return [self.model, self.twin]

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call, steps = contexts[0].call, [min(b.room, 2 + c.row) for c, b in zip(contexts, budgets, strict=True)]
        call.session(self.model).reader.on_host, call.session(self.twin).reader.on_host = False, True
        unseen = draft_chain(call.session(self.model), contexts, steps)
        seen = draft_chain(call.session(self.twin), contexts, steps)
        for here, there in zip(seen, unseen, strict=True):  # one ends with the text, the other only in its review
            assert list(here.tokens) == list(there.tokens)[: len(here.tokens)]
        self.lengths.extend(len(r.tokens) for r in seen)
        level = call.level(self)
        return [c.draft.extend(r.tokens, level) for c, r in zip(contexts, seen, strict=True)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_roll_on_the_device_is_so_many_steps(device: str, family: str, options: dict[str, Any]) -> None:
    target, medium, _ = placed(family, device)
    both = Both(medium, twin(family, device))
    target.generate(**moved(tiny.inputs_of(family, 3), device), **options, assistant=both, **FIXED)
    assert sum(both.lengths) > 30


def test_drafts_are_drawn_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's drafts come to the host as a whole, a CPU's are looked at token by token."""
    import csdraft.decoding.chain as module

    finish, chains = module.OnDevice.finish, []
    monkeypatch.setattr(module.OnDevice, "finish", lambda self: chains.append(1) or finish(self))
    target, _, small = placed("llama", device)
    target.generate(**moved(tiny.prompt(), device), **GREEDY, assistant=ModelDrafter(small), **FIXED)
    assert bool(chains) == (device != "cpu")
