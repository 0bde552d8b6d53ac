"""Copies of the user's processors and criteria, so that each row of a batch can keep its own state."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = ["row_copy"]

SHARED_MODULES = ("threading", "_thread", "queue", "multiprocessing")
"""What signals between threads must be the same object in every copy (and cannot be copied anyway)."""


def row_copy(thing: Any) -> Any:
    """A deep copy that shares models, tokenizers and what threads signal with."""
    shared = {id(value): value for value in getattr(thing, "__dict__", {}).values() if _is_shared(value)}
    return copy.deepcopy(thing, shared)


def _is_shared(value: object) -> bool:
    if isinstance(value, nn.Module | PreTrainedTokenizerBase):
        return True
    return type(value).__module__.partition(".")[0] in SHARED_MODULES
