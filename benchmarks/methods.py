"""The ways to generate that a benchmark compares: each is one function from the setup to keywords of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from csdraft import bench
from csdraft.bench import Method, configured
from csdraft.cascade import CascadeDrafter
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.drafters.auto import Auto
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.prompt_lookup import PromptLookup
from csdraft.schedules.fixed import Fixed

__all__ = ["DEFAULT", "K_MATRIX", "METHODS", "Setup", "build"]

K_MATRIX = ((2, 24), (0, 4))
"""Of the cascade [drafter, MaxGram], unless a run says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Setup(bench.Setup):
    """What all methods of a run share.

    Attributes:
        drafter: the loaded model.
        depth: draft tokens a round for the methods of fixed length.
        k_matrix: of the cascade [drafter, MaxGram].
    """

    drafter: PreTrainedModel
    depth: int = 5
    k_matrix: Sequence[Sequence[int]] = K_MATRIX

    @cached_property
    def random_model(self) -> PreTrainedModel:
        """The drafter's architecture with random weights: nearly nothing that it drafts is accepted."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            auto = AutoModelForSeq2SeqLM if self.drafter.config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_config(self.drafter.config)
        return model.to(self.drafter.device, self.drafter.dtype).eval()

    @property
    def models(self) -> list[PreTrainedModel]:
        """Every model that may run, the target first."""
        made = [self.random_model] if "random_model" in self.__dict__ else []
        return [self.target, self.drafter, *made]


class Nothing(Drafter):
    """Never drafts: csdraft's loop on its own."""

    depth = 0

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return [context.draft for context in contexts]


METHODS: dict[str, Callable[[Setup], dict[str, Any]]] = {}


def method(function: Callable[[Setup], dict[str, Any]]) -> Callable[[Setup], dict[str, Any]]:
    METHODS[function.__name__] = function
    return function


def build(names: Sequence[str], setup: Setup) -> list[Method]:
    """The methods of these names; `plain` comes first whether named or not, since all are compared with it."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"unknown methods {unknown}; known: {', '.join(METHODS)}")
    ordered = ["plain", *(name for name in dict.fromkeys(names) if name != "plain")]
    made = {name: METHODS[name](setup) for name in ordered}
    before = {name: made[name]["assistant"].memory.clear for name in made if name == "random_drafter_first"}
    return [Method(name, options, before.get(name)) for name, options in made.items()]


@method
def plain(setup: Setup) -> dict[str, Any]:
    """transformers without drafts."""
    return {}


@method
def hf_assisted_fixed(setup: Setup) -> dict[str, Any]:
    """transformers' assistant_model, a fixed number of tokens a round."""
    options = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    return {"assistant_model": configured(setup.drafter, num_assistant_tokens=setup.depth, **options)}


@method
def hf_assisted_default(setup: Setup) -> dict[str, Any]:
    """transformers' assistant_model as it comes."""
    return {"assistant_model": setup.drafter}


@method
def hf_prompt_lookup(setup: Setup) -> dict[str, Any]:
    """transformers' prompt lookup, a fixed number of tokens a round."""
    return {"prompt_lookup_num_tokens": setup.depth}


@method
def csdraft_empty(setup: Setup) -> dict[str, Any]:
    """csdraft's loop without a drafter."""
    return {"assistant": Nothing(), "schedule": Fixed(0)}


@method
def drafter_fixed(setup: Setup) -> dict[str, Any]:
    """One drafter model, a fixed number of tokens a round."""
    return {"assistant": ModelDrafter(setup.drafter), "schedule": Fixed(setup.depth)}


@method
def drafter(setup: Setup) -> dict[str, Any]:
    """One drafter model, csdraft's default schedule."""
    return {"assistant": ModelDrafter(setup.drafter)}


@method
def prompt_lookup_fixed(setup: Setup) -> dict[str, Any]:
    """transformers' prompt lookup rule in csdraft, a fixed number of tokens a round."""
    return {"assistant": PromptLookup(), "schedule": Fixed(setup.depth)}


@method
def max_gram(setup: Setup) -> dict[str, Any]:
    """MaxGram alone, csdraft's default schedule."""
    return {"assistant": MaxGram()}


@method
def max_gram_fixed(setup: Setup) -> dict[str, Any]:
    """MaxGram alone, a fixed number of tokens a round."""
    return {"assistant": MaxGram(), "schedule": Fixed(setup.depth)}


@method
def auto(setup: Setup) -> dict[str, Any]:
    """What `assistant="auto"` drafts with, nothing kept between calls: a run has its prompts several times."""
    return {"assistant": Auto(remember=False)}


@method
def cascade(setup: Setup) -> dict[str, Any]:
    """The drafter reviewing MaxGram, with a MaxGram tail; csdraft's default schedule."""
    return {"assistant": CascadeDrafter([setup.drafter, MaxGram()], k_matrix=setup.k_matrix)}


@method
def cascade_fixed(setup: Setup) -> dict[str, Any]:
    """The same cascade, the whole K matrix every round."""
    return {"assistant": CascadeDrafter([setup.drafter, MaxGram()], k_matrix=setup.k_matrix), "schedule": Fixed()}


@method
def random_drafter(setup: Setup) -> dict[str, Any]:
    """A drafter of random weights, default schedule, with what earlier calls have learned."""
    return {"assistant": ModelDrafter(setup.random_model)}


@method
def random_drafter_first(setup: Setup) -> dict[str, Any]:
    """The same, everything learned forgotten before each call (of other methods too: run it apart from them)."""
    return random_drafter(setup)


DEFAULT = tuple(name for name in METHODS if not name.startswith("random") and name != "cascade_fixed")
