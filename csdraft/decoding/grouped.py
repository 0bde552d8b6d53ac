"""Attention of grouped heads without copies of their keys and values, for the masks that drafted tokens need.

transformers (5.24) repeats keys and values for every query head as soon as several queries come with a mask. PyTorch's
kernel takes groups as they are. Models look up their attention by name, so a function of the same name is registered:
it does what the old one did, but within csdraft's own forwards. No model is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["grouped_heads"]

_here = threading.local()
_compiled = False
"""Whether csdraft runs a compiled forward: what torch compiles meanwhile is compiled again for other callers."""
_lock = threading.Lock()


@contextmanager
def grouped_heads(compiled: bool = False) -> Iterator[None]:
    """While entered, this thread's sdpa attention leaves grouped heads grouped.

    Args:
        compiled: whether a compiled forward runs. What is compiled cannot ask which thread it is, but torch compares
            `_compiled` before it runs compiled code: a user's own compiled model never gets this attention.
    """
    global _compiled
    with _lock:
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:  # unless another function was registered
            AttentionInterface.register("sdpa", _attention)
    _here.grouped, _compiled = True, compiled
    try:
        yield
    finally:
        _here.grouped = _compiled = False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention: (rows, heads, queries, head_dim) query, keys and values of fewer heads."""
    ours = _compiled if torch.compiler.is_compiling() else getattr(_here, "grouped", False)
    groups = getattr(module, "num_key_value_groups", 1)
    more = options.get("softcap") is not None or options.get("position_bias") is not None
    if not ours or more or groups == 1 or attention_mask is None or query.shape[1] != groups * key.shape[1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous(), None
