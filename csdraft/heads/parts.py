"""Parts that several kinds of heads share.

* `Numbered`: each drafted token has an output layer of its own (Medusa, Hydra, Chimera).
* `TextLayer`: a decoder layer that reads the text only (Hydra++, Clover-2).
* `CrossLayer`: a decoder layer whose queries and keys are of different entries (Chimera, Falcon, DFlash).
* `Stack`: several tokens are drafted from one forward (parallel heads, CTC, DFlash). The feature of an entry is a mark
  and a stack of k hidden states. For an entry of the text these are the target's fused state and zeros. The last entry
  of a text is read with placeholders for further tokens, and its output is the stack of all k hidden states. A drafted
  entry takes the first one off the stack, so it costs only an output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    repeat_kv,
    rotate_half,
)

from csdraft.decoding.cache_names import cache_name

__all__ = ["CrossLayer", "Numbered", "Rotary", "Stack", "TextLayer"]

TEXT, DRAFTED = 1, 2
"""Marks of entries; the mark of padding is 0."""
Rotary = tuple[Tensor, Tensor]
"""Factors of a rotary embedding, (rows, queries, head size) each."""


class Numbered:
    """A mixin of heads that draft `options.steps` tokens, each with another output layer.

    The last number of a head's output says how many tokens have been read since the text, and chooses the layer.
    """

    options: Any
    d2t: Tensor

    @property
    def deepest(self) -> int:
        return self.options.steps

    def logits_of(self, number: int, output: Tensor) -> Tensor:
        """(positions, draft vocab) logits of one output layer.

        Args:
            number: of the layer, from 0.
            output: (positions, feature width).
        """
        raise NotImplementedError

    def draft_logits(self, output: Tensor) -> Tensor:
        number = output[..., -1].long().clamp(max=self.deepest) - 1  # (...)
        logits = output.new_empty(*output.shape[:-1], len(self.d2t))
        for one in number.unique().tolist():
            logits[number == one] = self.logits_of(one, output[number == one])
        return logits


class TextLayer(nn.Module):
    """A Llama layer and a norm, over the entries of the text; it keeps keys and values of these alone."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.layer = LlamaDecoderLayer(config, 0)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._cache_name = cache_name(LlamaDecoderLayer.forward) or ""

    def forward(
        self, hidden: Tensor, drafted: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) the layer's output for entries of the text, and `hidden` itself for drafted ones.

        Args:
            hidden: (rows, queries, width).
            drafted: (rows, queries, 1) bool, whether an entry is of a draft. The text's entries must not see those.
            rotary, mask, cache: see `Head.output`.
        """
        if bool(drafted.all()):
            return hidden
        read = self.layer(hidden, mask, position_embeddings=rotary, **{self._cache_name: cache})
        return torch.where(drafted, hidden, self.norm(read))


class CrossLayer(nn.Module):
    """A Llama layer in parts: a kind of head says which queries meet which keys.

    Args:
        number: by which a cache knows the layer.
        qk_norm: whether queries and keys are normed, as in layers of Qwen 3.
    """

    def __init__(self, config: LlamaConfig, number: int = 0, qk_norm: bool = False):
        super().__init__()
        self.self_attn: Any = LlamaAttention(config, number)
        self.mlp = LlamaMLP(config)
        self.self_attn.q_norm, self.self_attn.k_norm = (
            LlamaRMSNorm(self.self_attn.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.input_layernorm, self.post_attention_layernorm = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def queries(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """(rows, heads, queries, head size) from hidden states, (rows, queries, width)."""
        return _rotated(self.self_attn.q_norm(self._heads(self.self_attn.q_proj(hidden))), rotary)

    def keys_and_values(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(rows, heads, slots, head size) each, from hidden states, (rows, slots, width)."""
        keys, values = (self._heads(layer(hidden)) for layer in (self.self_attn.k_proj, self.self_attn.v_proj))
        return _rotated(self.self_attn.k_norm(keys), rotary), values

    def attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(rows, queries, heads x head size) attention; the mask is (rows, 1, queries, slots) bool."""
        keys, values = (repeat_kv(part, self.self_attn.num_key_value_groups) for part in (keys, values))
        scale = self.self_attn.scaling
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
        return mixed.transpose(1, 2).flatten(-2)

    def finished(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """(rows, queries, width) the layer's output, from what it reads and what attention gives."""
        hidden = hidden + self.self_attn.o_proj(mixed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)


def _rotated(states: Tensor, rotary: Rotary) -> Tensor:
    """(rows, heads, queries, head size) states after rotation."""
    cos, sin = (factor[:, None] for factor in rotary)
    return states * cos + rotate_half(states) * sin


class Stack:
    """A mixin of heads that draft `options.steps` tokens from one forward."""

    config: Any
    options: Any

    @staticmethod
    def placeholder(options: Any, text: Any) -> int:
        """The token whose embedding placeholders have, the target's padding token by default; checks `blocks` too."""
        token = (getattr(text, "pad_token_id", None) or 0) if options.mask_token is None else options.mask_token
        if options.blocks < 1 or not 0 <= token < text.vocab_size:
            raise ValueError(
                f"blocks={options.blocks}, mask_token={token}; give at least 1 block, and one of the target's "
                f"{text.vocab_size} tokens"
            )
        return token

    def fused(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., width) what the head reads of the target's hidden states."""
        raise NotImplementedError

    def read(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, k, width) outputs of the last entry of each row, after all entries; see `Head.output`.

        Args:
            features: (rows, queries, width) from `fused`.
        """
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """How many hidden states one forward gives."""
        return self.options.steps

    @property
    def deepest(self) -> int:
        return self.options.steps

    @property
    def feature_width(self) -> int:
        return 1 + self.outputs * self.config.hidden_size

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        fused = self.fused(states)
        mark = torch.full_like(fused[..., :1], TEXT)
        return nn.functional.pad(torch.cat([mark, fused], -1), (0, self.feature_width - 1 - fused.shape[-1]))

    def first(self, output: Tensor) -> Tensor:
        """(..., width) the first hidden state of a stack."""
        return output[..., 1 : 1 + self.config.hidden_size]

    def begun(self, outputs: Tensor) -> Tensor:
        """(..., feature width) the stack of outputs (..., k, width), without its mark."""
        return nn.functional.pad(outputs.flatten(-2), (1, 0))

    def taken(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """(..., feature width) the stack after a drafted token, without its mark; the last state stays on it."""
        width = self.config.hidden_size
        return torch.cat([features[..., :1], features[..., 1 + width :], features[..., -width:]], -1)

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        of_text, drafted = features[..., :1] == TEXT, features[..., :1].sign() * DRAFTED  # (rows, queries, 1)
        left = self.taken(input_ids, features)
        if bool(of_text.any()):
            outputs = self.read(input_ids, position_ids, self.first(features), mask, cache)
            left[:, -1] = torch.where(of_text[:, -1], self.begun(outputs), left[:, -1])
        return torch.cat([drafted, left[..., 1:]], -1)
