"""Why a model cannot be decoded with drafts, as far as its class and config say; `probe` asks the model itself."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from csdraft.decoding.traits import CHUNKED, FULL, SLIDING, traits_of

__all__ = ["refusal"]

STATES = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
"""Kinds of layer that keep a state instead of keys and values."""

ENCODER_DECODERS = {"t5", "mt5"}


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be decoded with drafts; None if nothing speaks against it."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    name = f"{type(model).__name__} ({config.model_type})"
    kinds = set(getattr(text, "layer_types", None) or ()) - {FULL, SLIDING, CHUNKED}
    if states := kinds & STATES:
        return f"{name} has layers of kind {', '.join(sorted(states))}, whose state {ROLLED_BACK}"
    if getattr(model, "_is_stateful", False):
        return f"{name} keeps a recurrent state, which {ROLLED_BACK}"
    if kinds:
        return (
            f"{name} has layers of kind {', '.join(sorted(kinds))}, for which csdraft makes no mask; "
            "call generate without assistant="
        )
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        return f"{name} is an encoder-decoder outside {sorted(ENCODER_DECODERS)}; its positions cannot be set per row"
    if not config.is_encoder_decoder and "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids, which ragged rows and trees need (ALiBi models such as Bloom do not)"
    if getattr(text, "alibi", False):
        return f"{name} uses ALiBi, which is computed from slots instead of positions; use a rotary checkpoint"
    if text._attn_implementation not in ("sdpa", "eager"):
        return (
            f"{name} runs attention by {text._attn_implementation!r}, which takes no 4D mask; "
            "call model.set_attn_implementation('sdpa') first"
        )
    if len(traits_of(model).cache_windows) > 1:
        return (
            f"{name} has layer_types or windows in its config that its code makes no mask for, so that plain generate "
            "forgets tokens in some layers only; remove these fields from the config"
        )
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            f"{name} is in training mode with gradient checkpointing, where it keeps no keys and values (before "
            "transformers 5.24); call model.eval() or model.gradient_checkpointing_disable() first"
        )
    return None


ROLLED_BACK = (
    "cannot be rolled back when a draft is rejected; csdraft decodes models of attention alone (call generate "
    "without assistant=)"
)
