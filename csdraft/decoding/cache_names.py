"""What a model, and `generate`, call the KV cache: transformers 5.24 renamed `past_key_values` to `cache`.

Every other file asks here, so that one release of transformers is not told from another anywhere else.
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
    """The argument by which `function` takes a KV cache; None if it names none."""
    return _newest(inspect.signature(function).parameters)


def _newest(arguments: Collection[str]) -> str | None:
    return next((name for name in NAMES if name in arguments), None)


def cache_of_forward(model: Any) -> str | None:
    """The argument by which a model's forward takes a KV cache; None if it takes none."""
    return next((name for arguments in _forwards(model) if (name := _newest(arguments))), None)


def forward_takes(model: Any, name: str) -> bool:
    """Whether a model's forward takes this argument."""
    return any(name in arguments for arguments in _forwards(model))


def _forwards(model: Any) -> Iterator[Collection[str]]:
    """The arguments of its forward and, as long as that passes on what it does not name, of those it inherits.

    If none of them names the tokens, such as a `forward(*args, **kwargs)` around a model of another class, it is taken
    to pass on all that `generate` gives: the probe then shows whether it does.
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
