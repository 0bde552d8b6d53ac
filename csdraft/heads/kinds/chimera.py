"""Chimera (arXiv 2402.15758): a trigram encoder replaces the target's low layers, one attention layer all others.

The n-gram encoder makes one vector u from the embeddings of the newest three tokens: W (y + silu(V y + b)). Then comes
the context layer, a Llama layer. Its queries come from u. Its keys and values come from the target's last hidden
states of all tokens before the newest, and from u itself. Its output o replaces the target's last hidden state of the
newest token. Drafted token k has its own output layer, which reads [h, o], where h is the target's hidden state of the
text's last token. The feature of an entry is the state (o, or the target's in the text), the two tokens before the
newest, h, and how many tokens have been read since the text.

The paper leaves some things open. Here a drafted token sees the o of earlier drafted tokens as if they were the
target's states. If a text has fewer than three tokens, its first is repeated. Embeddings are normed before they are
joined: those of the text come from the target, which may scale or shift the rows of its table. The authors compute a
loss between o and the target's state and do not use it; it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from csdraft.heads.head import EMBEDDED, LAST, Head, HeadOptions
from csdraft.heads.parts import CrossLayer, Numbered, Rotary

__all__ = ["Chimera", "ChimeraOptions"]


@dataclass(frozen=True)
class ChimeraOptions(HeadOptions):
    """Keys of `init.chimera`. All steps have the same weight, as in the authors' code."""

    decay: float = 1.0


class NGram(nn.Module):
    """Makes one vector from three embeddings; the residual part is 0 in a new head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width = config.hidden_size
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.linear, self.join = nn.Linear(3 * width, 3 * width), nn.Linear(3 * width, width, bias=False)

    def forward(self, embedded: Tensor) -> Tensor:
        """(..., width) from (..., 3, width)."""
        joined = self.norm(embedded).flatten(-2)
        return self.join(joined + nn.functional.silu(self.linear(joined)))


class ContextLayer(CrossLayer):
    """A Llama layer with queries from one sequence and keys from another."""

    def forward(
        self, grams: Tensor, states: Tensor, at_gram: Rotary, at_state: Rotary, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) its output, from n-grams and states of the same shape.

        Args:
            at_gram, at_state: rotary embeddings of their positions; those of the states are one lower.
        """
        gram = self.input_layernorm(grams)
        query, own = self.queries(gram, at_gram), self.keys_and_values(gram, at_gram)
        past = self.keys_and_values(self.input_layernorm(states), at_state)
        if cache is not None:
            past = cache.update(*past, self.self_attn.layer_idx)
        rows, _, queries, _ = query.shape
        slots = past[0].shape[2]
        causal = query.new_ones(queries, slots, dtype=torch.bool).tril(slots - queries) if mask is None else mask
        itself = torch.eye(queries, dtype=torch.bool, device=query.device)
        sees = torch.cat([part.expand(rows, 1, -1, -1) for part in (causal, itself)], -1)  # (.., slots + queries)
        keys, values = (torch.cat(parts, 2) for parts in zip(past, own, strict=True))
        return self.finished(grams, self.attended(query, keys, values, sees))


class Chimera(Numbered, Head):
    """Chimera."""

    Options = ChimeraOptions
    attention_layers = 1
    output_layer = False
    detached = True
    before = 1
    _no_split_modules = ["ContextLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: ChimeraOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width, count = config.hidden_size, len(self.d2t)
        self.encoder, self.context = NGram(config), ContextLayer(self.config)  # type: ignore[arg-type]
        self.outputs = nn.ModuleList(nn.Linear(2 * width, count, bias=False) for _ in range(options.steps))
        self.post_init()

    @property
    def feature_width(self) -> int:
        return 4 * self.config.hidden_size + 1

    @property
    def taps(self) -> tuple[int, ...]:
        return LAST, EMBEDDED

    def start(self, rows: Tensor) -> None:
        for output in self.outputs:
            output.weight.copy_(torch.cat([rows, rows], -1))  # type: ignore[operator,union-attr]
        self.encoder.linear.weight.zero_()
        self.encoder.linear.bias.zero_()

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        last, embedded = (states[tap].to(self.device, self.dtype) for tap in self.taps)
        earlier = torch.cat([embedded[..., :1, :], embedded[..., :-1, :]], -2)  # (..., tokens, width)
        return torch.cat([last, embedded, earlier, last, torch.zeros_like(last[..., :1])], -1)

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        count, vectors = features[..., -1:], features[..., :-1].unflatten(-1, (4, -1))
        state, before, earlier, last = vectors.unbind(-2)  # (rows, queries, width) each
        earlier = torch.where(position_ids[..., None] == 0, before, earlier)  # texts that share a row do not mix
        newest = self.embed_tokens(input_ids).to(features.dtype)
        gram = self.encoder(torch.stack([earlier, before, newest], -2))
        at_gram, at_state = self.rotary(features, position_ids + 1), self.rotary(features, position_ids)
        made = self.context(gram, state, at_gram, at_state, mask, cache)
        return torch.cat([made, newest, before, last, count + 1], -1)

    def logits_of(self, number: int, output: Tensor) -> Tensor:
        made, _, _, last, _ = output.split([self.config.hidden_size] * 4 + [1], -1)  # (positions, width) each
        return self.outputs[number](torch.cat([last, made], -1))
