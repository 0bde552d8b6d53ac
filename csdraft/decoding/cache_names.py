"""What a model, and `generate`, call the KV cache: transformers 5.24 renamed `past_key_values` to `cache`.

Every other file asks here, so that one release of transformers is not told from another anywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

__all__ = ["GENERATE_CACHE", "cache_name"]

NAMES = ("cache", "past_key_values")
"""Newest first: a function that takes both has kept the older one for compatibility."""


def cache_name(function: Callable[..., Any]) -> str | None:
    """The argument by which `function` takes a KV cache; None if it names none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


GENERATE_CACHE = next(name for name in NAMES if name in {f.name for f in fields(GenerateDecoderOnlyOutput)})
"""The key of the cache among the inputs that `generate` prepares, and in what it returns."""
