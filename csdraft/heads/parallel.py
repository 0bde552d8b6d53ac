"""A parallel head: all tokens of a draft from one forward (ParallelSpec, arXiv 2410.05589; P-EAGLE, arXiv 2602.01469).

It is an EAGLE-3 head that reads placeholders after the text's last entry, one for each further token. Such a one has
the embedding of one fixed token and one learned feature. It sees the text and the placeholders before it, never a
drafted token: so the distribution of the third drafted token is the same whatever the first two are. Drafting a chain
or a tree takes one forward of the layers; each further token is an output layer alone.

Following P-EAGLE, the text's last entry itself gives the first token, so that k tokens take k - 1 placeholders. Their
keys and values are never kept. The papers' attention mask lets placeholders of one entry see those of no other entry;
in a draft, only those of the last entry are read.

The feature of an entry is a mark and k hidden states. In the text those are the target's fused state and zeros. In a
draft they are what is left of the k outputs of the text's last entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from csdraft.decoding.cache_names import cache_name
from csdraft.heads.beside import Beside, beside_mask
from csdraft.heads.eagle3 import Eagle3, Eagle3Options
from csdraft.heads.head import Steps, step_masks

__all__ = ["Parallel", "ParallelOptions"]

TEXT, DRAFTED = 1, 2
"""Marks of entries; 0 is that of padding."""


@dataclass(frozen=True)
class ParallelOptions(Eagle3Options):
    """What makes one parallel head differ from another, beside its layers' config.

    Args:
        mask_token: its embedding stands in placeholders.
        blocks: decoder layers; the first is EAGLE-3's, the others are Llama's.
        steps: how many tokens it drafts.
        decay: weight of a token in the loss, relative to the one before.
    """

    mask_token: int = 0
    blocks: int = 1
    steps: int = 4
    decay: float = 0.8


class Parallel(Eagle3):
    """A parallel head; names of modules are those of speculators, but for `midlayer`, its layers.0."""

    _no_split_modules = ["Layer", "LlamaDecoderLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: ParallelOptions):
        super().__init__(config, options, options.steps, options.decay)
        numbers = range(1, options.blocks)
        self.layers = nn.ModuleDict({str(i): LlamaDecoderLayer(self.config, i) for i in numbers})  # type: ignore[arg-type]
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, len(options.layers) * options.target_width))
        self._cache_name = cache_name(LlamaAttention.forward) or ""

    @classmethod
    def layers_of(cls, options: ParallelOptions) -> int:
        return options.blocks

    @property
    def deepest(self) -> int:  # type: ignore[override]
        return self.options.steps

    @property
    def feature_width(self) -> int:
        return 1 + self.options.steps * self.config.hidden_size

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        fused = super().fuse(states)  # (..., width)
        mark = torch.full_like(fused[..., :1], TEXT)
        return nn.functional.pad(torch.cat([mark, fused], -1), (0, (self.options.steps - 1) * fused.shape[-1]))

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.norm(output[..., 1 : 1 + self.config.hidden_size]))

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        mark, width = features[..., :1], self.config.hidden_size
        marked = mark.sign() * DRAFTED
        left = torch.cat([marked, features[..., 1 + width :], features[..., -width:]], -1)  # past its end: the last
        if not bool((mark == TEXT).any()):
            return left
        read = torch.cat([marked, self._read(input_ids, position_ids, features, mask, cache)], -1)
        return torch.where(mark == TEXT, read, left)

    def _read(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, k x width) outputs of entries of the text; all k of each row's last one, else the first."""
        width, more = self.config.hidden_size, self.options.steps - 1
        seen = Beside(cache)
        hidden = self._run(self.embed_tokens(input_ids), features[..., 1 : 1 + width], position_ids, mask, seen)
        stack = nn.functional.pad(hidden, (0, more * width))
        if more:
            places = position_ids[:, -1:] + torch.arange(1, 1 + more, device=position_ids.device)
            own = beside_mask(mask, seen.slots, more, causal=True, device=hidden.device)
            further = self._run(*self._placeholders(*places.shape), places, own, seen)  # (rows, k - 1, width)
            stack[:, -1, width:] = further.flatten(1)
        return stack

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Placeholders of all entries, one step after the other: step s reads the s-th of each entry."""
        width, cache = self.config.hidden_size, Steps()
        embedded, hidden = self.embed_tokens(input_ids.roll(-1, 1)), features[..., 1 : 1 + width]
        for step, mask in enumerate(step_masks(position_ids, steps)):
            output = self._run(embedded, hidden, position_ids + step, mask, cache)
            yield nn.functional.pad(output, (1, 0))
            embedded, hidden = self._placeholders(*position_ids.shape)

    def _placeholders(self, rows: int, count: int) -> tuple[Tensor, Tensor]:
        """(rows, count, width) embeddings, and as many features."""
        hidden = self.mask_hidden[0, 0].split(self.options.target_width)
        feature = super().fuse(dict(zip(self.taps, hidden, strict=True)))
        embedded = self.embed_tokens.weight[self.options.mask_token]
        return embedded.expand(rows, count, -1), feature.expand(rows, count, -1)

    def _run(
        self, embedded: Tensor, features: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) what the layers compute."""
        rotary = self.rotary(features, position_ids)
        hidden = self.midlayer(embedded.to(features.dtype), features, rotary, mask, cache)
        for layer in self.layers.values():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{self._cache_name: cache})
        return hidden
