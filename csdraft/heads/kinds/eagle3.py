"""EAGLE-3 (arXiv 2503.01840): one decoder layer that drafts from three hidden states of the target.

Entry i of the head reads token i + 1 and the feature of token i, and predicts token i + 2. The feature is the
target's hidden states after three blocks, fused by one matrix. The layer's attention reads [norm(embedding),
norm(feature)], and its residual is the feature. In a draft the layer's output, before the last norm, is the feature of
the next entry. The output layer has rows for the draft vocabulary only: all other tokens get probability 0. Training
unrolls it as in drafting (training-time test), and compares distributions over the draft vocabulary only.

The layer is made of transformers' Llama parts; this file has only what EAGLE-3 changes. Modules have the names of
published checkpoints, which `csdraft/heads/formats/eagle3.py` reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from csdraft.decoding.cache_names import cache_name
from csdraft.heads.head import Head, HeadOptions

__all__ = ["Eagle3", "Eagle3Options", "attention", "default_layers", "fused_layers"]


@dataclass(frozen=True)
class Eagle3Options(HeadOptions):
    """What distinguishes one EAGLE-3 head from another; keys of `init.eagle3`, with those of `HeadOptions`.

    Args:
        layers: the target's hidden states that are fused; k is the one after k blocks; None: 2, L/2, L - 3.
        target_width: their width.
        norm_before_residual: whether the residual is the normed feature.
        norm_before_fc: whether the hidden states are normed together before they are fused.
        fc_norm: whether each hidden state is normed before they are fused.
        norm_output: whether the feature for the next entry is normed.
        qk_norm: whether queries and keys are normed, as in layers of Qwen 3.
    """

    layers: tuple[int, ...] | None = None
    target_width: int = 0
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False


def fused_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The hidden states that a head fuses of a target of `count` layers; ValueError if these cannot be."""
    layers = tuple(layers or default_layers(count))
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= count:
        raise ValueError(f"layers={list(layers)} must be rising numbers from 0 to {count}, the target's")
    return layers


def default_layers(count: int) -> tuple[int, int, int]:
    """The hidden states that EAGLE-3 fuses of a target of `count` layers; ValueError if it has too few."""
    if count < 6:
        raise ValueError(
            f"an EAGLE-3 head reads the hidden states after blocks 2, L/2 and L - 3 by default, but the target has "
            f"L={count} layers; name others by layers, such as {list(range(min(3, count)))}"
        )
    return 2, count // 2, count - 3


def attention(config: LlamaConfig, number: int, qk_norm: bool) -> nn.Module:
    """The attention of a layer of Llama, or of Qwen 3, which norms queries and keys."""
    return Qwen3Attention(config, number) if qk_norm else LlamaAttention(config, number)  # type: ignore[arg-type]


class Layer(nn.Module):
    """The one decoder layer: attention reads the embedding and the feature side by side."""

    def __init__(self, config: LlamaConfig, norm_before_residual: bool, qk_norm: bool = False):
        super().__init__()
        width, self.norm_before_residual = config.hidden_size, norm_before_residual
        self.self_attn = attention(config, 0, qk_norm)
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * width, old.out_features, bias=old.bias is not None))
        self.mlp = LlamaMLP(config)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(3)
        )
        self._cache_name = cache_name(type(self.self_attn).forward) or ""

    def forward(
        self, embedded: Tensor, features: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) its output, from embeddings and features of the same shape."""
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        both = torch.cat([self.input_layernorm(embedded), normed], -1)  # (rows, queries, 2 width)
        mixed, _ = self.self_attn(both, rotary, mask, **{self._cache_name: cache})
        residual = residual + mixed
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3(Head):
    """An EAGLE-3 head, complete with an embedding. Its own width may differ from the target's.

    Args:
        config: of the layer; `vocab_size` is the target's.
        options: see `Eagle3Options`.
    """

    InitOptions = Eagle3Options
    layout = "eagle3"
    attention_layers = 1
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: Eagle3Options, draft_vocab: int | None = None):
        super().__init__(config, options, options.draft_vocab)
        width, count = config.hidden_size, len(options.layers)  # type: ignore[arg-type] - known by now, see `fitted`
        if options.norm_before_fc:
            self.input_norm = LlamaRMSNorm(count * options.target_width, config.rms_norm_eps)
        if options.fc_norm:
            norms = (LlamaRMSNorm(options.target_width, config.rms_norm_eps) for _ in range(count))
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(count * options.target_width, width, bias=False)
        self.midlayer = Layer(self.config, options.norm_before_residual, options.qk_norm)  # type: ignore[arg-type]
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.post_init()

    @classmethod
    def fitted(cls, options: Any, text: Any, draft_vocab: int) -> Any:
        layers = fused_layers(options.layers, text.num_hidden_layers)
        return replace(options, layers=layers, target_width=text.hidden_size, draft_vocab=draft_vocab)

    @property
    def taps(self) -> tuple[int, ...]:
        return self.options.layers

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., width) features from the target's hidden states, (..., target's width) by tap."""
        parts = [states[tap].to(self.fc.weight.device, self.fc.weight.dtype) for tap in self.taps]
        if self.options.fc_norm:
            parts = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        joined = torch.cat(parts, -1)
        return self.fc(self.input_norm(joined) if self.options.norm_before_fc else joined)

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        output = self.midlayer(embedded, features, self.rotary(features, position_ids), mask, cache)
        return self.norm(output) if self.options.norm_output else output

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(output if self.options.norm_output else self.norm(output))
