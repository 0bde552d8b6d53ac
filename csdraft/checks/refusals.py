"""Why a model cannot be decoded with drafts, by its class and config; `probe` tests the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csdraft.decoding.cache_names import cache_of_forward, forward_takes
from csdraft.decoding.traits import CHUNKED, FULL, SLIDING, traits_of

__all__ = ["refusal"]

STATES = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
"""Types of layers that keep a state instead of keys and values."""

ENCODER_DECODERS = {"t5", "mt5"}
"""Encoder-decoders whose decoder csdraft can tell the positions of drafted tokens."""
ROLLED_BACK = (
    "cannot be rolled back when a draft is rejected; csdraft decodes models that use attention only (call generate "
    "without assistant=)"
)
PLAINLY = "call generate without assistant="


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be decoded with drafts; None if no reason is known."""
    found = _state(model) or _positions(model) or _attention(model) or _mode(model)
    return found and f"{type(model).__name__} ({model.config.model_type}) {found}"  # type: ignore[union-attr]


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]


def _state(model: nn.Module) -> str | None:
    """What the model keeps besides keys and values."""
    kinds = set(getattr(_text_config(model), "layer_types", None) or ()) - {FULL, SLIDING, CHUNKED}
    if states := kinds & STATES:
        return f"has layers of type {', '.join(sorted(states))}, whose state {ROLLED_BACK}"
    if kinds:
        return f"has layers of type {', '.join(sorted(kinds))}, for which csdraft makes no mask; {PLAINLY}"
    if getattr(model, "_is_stateful", False):
        return f"keeps a recurrent state, which {ROLLED_BACK}"
    if cache_of_forward(model) is None:
        return f"takes no KV cache, and csdraft reads drafts with one; {PLAINLY}"
    return None


def _positions(model: nn.Module) -> str | None:
    """Whether the model can be told the position of each token."""
    config: Any = model.config
    if config.is_encoder_decoder:
        known = config.model_type in ENCODER_DECODERS
        families = " and ".join(sorted(ENCODER_DECODERS))
        return None if known else f"is an encoder-decoder, and csdraft can place drafts in those of {families} only"
    if not forward_takes(model, "position_ids"):
        return f"takes no position_ids, which rows of different lengths and branches of a draft need; {PLAINLY}"
    if getattr(_text_config(model), "alibi", False):
        return f"uses ALiBi, which counts slots of the cache instead of positions; {PLAINLY}"
    return None


def _attention(model: nn.Module) -> str | None:
    """Whether the model applies the masks that it is given, and no others."""
    if any(_has_window(buffer) for buffer in model.buffers()):
        return (
            "limits how far back it sees by a table of its own, which counts slots of the cache instead of "
            f"positions; {PLAINLY}"
        )
    implementation = _text_config(model)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return (
            f"uses the attention implementation {implementation!r}, which takes no 4D mask; call "
            "model.set_attn_implementation('sdpa') first"
        )
    if len(traits_of(model).cache_windows) > 1:
        return (
            "has layer_types or windows in its config that its code makes no mask for, so plain generate drops tokens "
            "in some layers only; remove these fields from the config"
        )
    return None


def _mode(model: nn.Module) -> str | None:
    """Whether the model is in a mode in which it keeps no keys and values."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            "is in training mode with gradient checkpointing, in which it keeps no keys and values (before "
            "transformers 5.24); call model.eval() or model.gradient_checkpointing_disable() first"
        )
    return None


def _has_window(buffer: Tensor) -> bool:
    """Whether a buffer is a square attention mask in which the last token does not see the first."""
    if buffer.dtype not in (torch.bool, torch.uint8) or buffer.dim() < 2:
        return False
    queries, slots = buffer.shape[-2:]
    return queries == slots > 1 and not bool(buffer.reshape(-1, queries, slots)[0, -1, 0])
