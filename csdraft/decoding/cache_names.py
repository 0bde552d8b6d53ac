"""The name of the KV cache in models and in `generate`: transformers 5.24 renamed `past_key_values` to `cache`.

No other file depends on which of the two names a release of transformers uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Any

from torch import nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

__all__ = ["GENERATE_CACHE", "cache_name", "cache_of_forward", "forward_takes"]

NAMES = ("cache", "past_key_values")
"""Newest first: a function that takes both has kept the older one for compatibility."""


def cache_name(function: Callable[..., Any]) -> str | None:
    """The name of `function`'s argument for a KV cache; None if it has none."""
    return _newest(inspect.signature(function).parameters)


def _newest(arguments: Collection[str]) -> str | None:
    return next((name for name in NAMES if name in arguments), None)


def cache_of_forward(model: Any) -> str | None:
    """The name of the forward's argument for a KV cache; None if it takes none."""
    return next((name for arguments in _forwards(model) if (name := _newest(arguments))), None)


def forward_takes(model: Any, name: str) -> bool:
    """Whether a model's forward takes this argument."""
    return any(name in arguments for arguments in _forwards(model))


def _forwards(model: Any) -> Iterator[Collection[str]]:
    """The arguments of a model's forward and, as long as they include `**kwargs`, of the forwards that it inherits.

    If none of them has `input_ids`, such as a `forward(*args, **kwargs)` that calls a model of another class, it is
    assumed to pass on everything that `generate` gives; the probe then shows whether it does.
    """
    named = False
    classes = [made for made in type(model).__mro__ if made is not nn.Module and "forward" in vars(made)]
    inherited = [vars(made)["forward"] for made in classes]
    for forward in (model.forward, *inherited):
        arguments = inspect.signature(forward).parameters
        named = named or "input_ids" in arguments
        yield arguments
        if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
            return
    if not named:
        yield {GENERATE_CACHE, "position_ids", "logits_to_keep"}


GENERATE_CACHE = next(name for name in NAMES if name in {f.name for f in fields(GenerateDecoderOnlyOutput)})
"""The key of the cache among the inputs that `generate` prepares, and in what it returns."""
