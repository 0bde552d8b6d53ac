"""Faster attention: grouped heads without copies, and one query in half precision on a CPU.

transformers (5.24) repeats keys and values for every query head as soon as several queries come with a mask. PyTorch's
kernel takes groups as they are. On a CPU it is slow for one query in bfloat16 or float16: the heads of a group, passed
as queries of one head, take a tenth to a half of the time. Models look up their attention by name, so a function of
the same name is registered. It behaves differently only within csdraft's own forwards. No model is touched.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["GroupedHeads", "logits_to_read"]

FEW = 16
"""Up to this many queries, their logits cost less than a copy of the output layer."""
WIDEST_HEAD, OLDEST_CUDNN = 128, 91500
"""The widest heads that cuDNN's attention takes, and the version that PyTorch wants to be newer."""
_here = threading.local()
_compiled = False
"""Whether csdraft runs a compiled forward: what torch compiles meanwhile is compiled again for other callers."""


class GroupedHeads:
    """While entered, this thread's sdpa attention leaves grouped heads grouped.

    Args:
        compiled: whether a compiled forward runs. Compiled code cannot ask which thread it runs in, but torch compares
            `_compiled` before it runs such code: a user's own compiled model never gets this attention.
    """

    def __init__(self, compiled: bool = False):
        self.compiled = compiled

    def __enter__(self) -> None:
        global _compiled
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:  # unless another function was registered
            AttentionInterface.register("sdpa", _attention)
        _here.grouped, _compiled = True, self.compiled

    def __exit__(self, *error: object) -> None:
        global _compiled
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
    fits = ours and not more and query.shape[1] == groups * key.shape[1]
    if fits and _is_slow(query, groups) and (attention_mask is None or attention_mask.shape[1] == 1):
        found = _one_query(query, key, value, attention_mask, dropout, scaling, groups)
    elif fits and groups > 1 and attention_mask is not None and _has_kernel(query, value):
        found = sdpa(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return found.transpose(1, 2).contiguous(), None


def logits_to_read(keep: int, queries: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many of the last queries get logits if `keep` are wanted: all of them in bfloat16 on a CPU, if they are few.

    There PyTorch (2.13) copies a frozen output layer before it multiplies it by a part of a forward's states, which
    takes ten times as long as the logits of a few more queries.
    """
    return queries if dtype == torch.bfloat16 and device.type == "cpu" and queries <= FEW else keep


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch (2.13) takes groups under a mask as they are. On CUDA only cuDNN's kernel does.

    Where it is not chosen, PyTorch repeats keys and values itself, in float32, and holds all scores in memory: then
    transformers' way is faster.
    """
    if query.device.type != "cuda":
        return True
    fits = query.dtype in (torch.bfloat16, torch.float16) and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
    return fits and _prefers_cudnn(query.device)


@torch.compiler.assume_constant_result
def _prefers_cudnn(device: torch.device) -> bool:
    """Whether PyTorch (2.11, 2.13) tries cuDNN's attention first: on Hopper and Blackwell of data centres."""
    version = torch.backends.cudnn.version() or 0
    return torch.cuda.get_device_capability(device)[0] in (9, 10) and version > OLDEST_CUDNN


def _is_slow(query: Tensor, groups: int) -> bool:
    """Whether `_one_query` is faster (PyTorch 2.13): one query, on a CPU, in bfloat16, or in float16 with groups."""
    if query.shape[2] != 1 or query.device.type != "cpu":
        return False
    return query.dtype == torch.bfloat16 or (query.dtype == torch.float16 and groups > 1)


def _one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, groups: int
) -> Tensor:
    """(rows, heads, 1, head_dim) attention of one query, with the heads of a group as queries of one head."""
    if groups == 1:  # the same query twice: two are faster than one
        return sdpa(query.expand(-1, -1, 2, -1), key, value, mask, dropout, scale=scaling)[:, :, :1]
    rows, heads, _, size = query.shape
    folded = query.reshape(rows, heads // groups, groups, size)
    return sdpa(folded, key, value, mask, dropout, scale=scaling).reshape(rows, heads, 1, -1)
