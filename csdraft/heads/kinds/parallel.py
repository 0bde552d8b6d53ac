"""A parallel head: all tokens of a draft from one forward (ParallelSpec, arXiv 2410.05589; P-EAGLE, arXiv 2602.01469).

It is an EAGLE-3 head that reads placeholders after the text's last entry, one for each further token. A placeholder
has the embedding of one fixed token and one learned feature. It sees the text and the placeholders before it, never a
drafted token, so the distribution of the third drafted token does not depend on the first two. Drafting a chain or a
tree takes one forward of the layers; each further token costs only an output layer.

As in P-EAGLE, the text's last entry itself gives the first token, so k tokens take k - 1 placeholders. Their keys and
values are never kept. In the papers' attention mask placeholders of one entry do not see those of another; in a draft,
only those of the last entry are read. One training step compares every placeholder of every entry with the target;
P-EAGLE leaves some out to save memory, csdraft does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from csdraft.decoding.cache_names import cache_name
from csdraft.heads.head import Steps, step_masks, text_mask
from csdraft.heads.kinds.eagle3 import Eagle3, Eagle3Options, attention
from csdraft.heads.parts import Stack

__all__ = ["Parallel", "ParallelOptions"]


@dataclass(frozen=True)
class ParallelOptions(Eagle3Options):
    """What distinguishes one parallel head from another; keys of `init.parallel`.

    Args:
        mask_token: the token whose embedding the placeholders have; None: the target's padding token, else 0.
        blocks: how many decoder layers it has; the first is EAGLE-3's, the others are ordinary ones.
        steps, decay: how many tokens it drafts; the weight of a token in the loss, relative to the one before.
    """

    mask_token: int | None = None
    blocks: int = 1


class Parallel(Stack, Eagle3):
    """A parallel head. Modules have the names of speculators, except `midlayer`, which is its layers.0."""

    InitOptions = ParallelOptions
    layout = "parallel"
    _no_split_modules = ["Layer", "LlamaDecoderLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: ParallelOptions, draft_vocab: int | None = None):
        super().__init__(config, options)
        numbers = range(1, options.blocks)
        self.layers = nn.ModuleDict({str(i): LlamaDecoderLayer(self.config, i) for i in numbers})  # type: ignore[arg-type]
        for number, layer in self.layers.items():
            layer.self_attn = attention(self.config, int(number), options.qk_norm)  # type: ignore[arg-type]
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        self._cache_name = cache_name(LlamaAttention.forward) or ""

    @classmethod
    def fitted(cls, options: Any, text: Any, draft_vocab: int) -> Any:
        return replace(super().fitted(options, text, draft_vocab), mask_token=cls.placeholder(options, text))

    @classmethod
    def layers_of(cls, options: ParallelOptions) -> int:
        return options.blocks

    def fused(self, states: Mapping[int, Tensor]) -> Tensor:
        return Eagle3.fuse(self, states)

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.first(output)))

    def read(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        more, seen = self.outputs - 1, Steps(cache)
        hidden = self._run(self.embed_tokens(input_ids), features, position_ids, mask, seen)[:, -1:]
        if not more:
            return hidden
        places = position_ids[:, -1:] + torch.arange(1, 1 + more, device=position_ids.device)
        # A placeholder sees what the last entry sees, earlier placeholders, and itself.
        of_text = hidden.new_ones(1, 1, 1, seen.held[0][0].shape[2], dtype=torch.bool) if mask is None else mask
        own = hidden.new_ones(len(of_text), 1, more, more, dtype=torch.bool).tril()
        sees = torch.cat([of_text[:, :, -1:].expand(-1, -1, more, -1), own], -1)  # (rows, 1, more, slots + more)
        return torch.cat([hidden, self._run(*self._placeholders(*places.shape), places, sees, seen)], 1)

    def every(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.pad(next(self._groups(input_ids, position_ids, features, mask, 1)), (1, 0))

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Step s reads the s-th placeholder of every entry."""
        sees, ids = text_mask(position_ids), input_ids.roll(-1, 1)
        for output in self._groups(ids, position_ids, features, sees, steps):
            yield nn.functional.pad(output, (1, 0))

    def _groups(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, sees: Tensor, count: int
    ) -> Iterator[Tensor]:
        """(rows, length, width) outputs of the entries, then of the first placeholder after each, and so on."""
        embedded, hidden, cache = self.embed_tokens(input_ids), self.first(features), Steps()
        for step, mask in enumerate(step_masks(sees, count)):
            yield self._run(embedded, hidden, position_ids + step, mask, cache)
            embedded, hidden = self._placeholders(*position_ids.shape)

    def _placeholders(self, rows: int, count: int) -> tuple[Tensor, Tensor]:
        """(rows, count, width) embeddings, and features of the same shape."""
        hidden = self.mask_hidden[0, 0].split(self.options.target_width)
        feature = self.fused(dict(zip(self.taps, hidden, strict=True)))
        embedded = self.embed_tokens.weight[self.options.mask_token]
        return embedded.expand(rows, count, -1), feature.expand(rows, count, -1)

    def _run(
        self, embedded: Tensor, features: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, queries, width) output of the layers."""
        rotary = self.rotary(features, position_ids)
        hidden = self.midlayer(embedded.to(features.dtype), features, rotary, mask, cache)
        for layer in self.layers.values():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{self._cache_name: cache})
        return hidden
