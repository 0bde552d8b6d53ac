"""DFlash (arXiv 2602.06036): a block of tokens from one forward, whose placeholders see one another.

The block is the text's last token and one placeholder for each token to draft, with the target's embeddings. Within
the block, attention is bidirectional. Of the text, the block sees only the target's hidden states: one matrix fuses
those of several layers, and every layer of the head makes keys and values from the result. So no layer ever runs over
the text, and the head's cache holds projections of features.

Entry i holds the feature of token i, which every layer projects, and token i + 1, the first token of a block after it.
Placeholder j of that block predicts token i + 1 + j. If `from_anchor` is set, the block's first token predicts the
next one itself, and the block has one placeholder less.

The paper trains on a random sample of a text's tokens, csdraft on all. The paper weighs token j of a block by
exp(-(j - 1) / gamma), with gamma = 4 for blocks of 8. Here `decay` is the factor from one token to the next.

The layers are Qwen 3's: Llama's with normed queries and keys. Modules have the names of published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from csdraft.heads.head import Head, HeadOptions, text_mask
from csdraft.heads.kinds.eagle3 import fused_layers
from csdraft.heads.parts import CrossLayer, Rotary, Stack

__all__ = ["Dflash", "DflashOptions"]


@dataclass(frozen=True)
class DflashOptions(HeadOptions):
    """What distinguishes one DFlash head from another; keys of `init.dflash`, with those of `HeadOptions`.

    Args:
        layers: the target's hidden states that are fused; k is the one after k blocks, from 1 on; None: 2, L/2, L - 3.
        target_width: their width.
        mask_token: the token whose embedding the placeholders have; None: the target's padding token, else 0.
        blocks: how many decoder layers it has.
        steps: how many tokens it drafts.
        decay: weight of a token in the loss, relative to the one before.
        from_anchor: whether the block's first token also predicts one.
    """

    layers: tuple[int, ...] | None = None
    target_width: int = 0
    mask_token: int | None = None
    blocks: int = 1
    from_anchor: bool = False


class Block(CrossLayer):
    """One decoder layer. A block of tokens reads itself, and keys and values made from the target's features."""

    def __init__(self, config: LlamaConfig, number: int):
        super().__init__(config, number, qk_norm=True)

    def forward(self, hidden: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, blocks x length, width) its output.

        Args:
            hidden: (rows, blocks x length, width).
            keys, values: (rows, heads, slots, head size) of the text.
            mask: (rows, 1, blocks, slots) bool: which slots of the text each block sees; None: all, one block per row.
        """
        normed, blocks = self.input_layernorm(hidden), 1 if mask is None else mask.shape[2]
        queries, own = self.queries(normed, rotary), self.keys_and_values(normed, rotary)
        own_keys, own_values = (states.unflatten(2, (blocks, -1)) for states in own)  # rhbcd
        # Einsum letters: rows, heads, group of query heads, blocks, length, slots, c = length of keys, d = head size.
        grouped = queries.unflatten(1, (own_keys.shape[1], -1)).unflatten(3, (blocks, -1))  # rhgbld
        to_text = torch.einsum("rhgbld,rhsd->rhgbls", grouped, keys) * self.self_attn.scaling
        if mask is not None:
            to_text = to_text.masked_fill(~mask[:, :, None, :, None], float("-inf"))
        to_own = torch.einsum("rhgbld,rhbcd->rhgblc", grouped, own_keys) * self.self_attn.scaling
        weights = torch.cat([to_text, to_own], -1).float().softmax(-1).to(queries.dtype)
        of_text, of_own = weights.split([to_text.shape[-1], to_own.shape[-1]], -1)
        mixed = torch.einsum("rhgbls,rhsd->rblhgd", of_text, values)
        mixed = mixed + torch.einsum("rhgblc,rhbcd->rblhgd", of_own, own_values)
        return self.finished(hidden, mixed.flatten(3).flatten(1, 2))


class Dflash(Stack, Head):
    """A DFlash head. Its embedding is mostly the target's, and so is the output layer if it drafts all tokens."""

    InitOptions = DflashOptions
    layout = "dflash"
    frozen_output = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: DflashOptions, draft_vocab: int | None = None):
        super().__init__(config, options, options.draft_vocab)
        width, fused = config.hidden_size, len(options.layers) * options.target_width  # type: ignore[arg-type]
        self.fc = nn.Linear(fused, width, bias=False)
        self.layers = nn.ModuleList(Block(self.config, i) for i in range(options.blocks))  # type: ignore[arg-type]
        self.hidden_norm, self.norm = (LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.post_init()

    @classmethod
    def fitted(cls, options: Any, text: Any, draft_vocab: int) -> Any:
        if 0 in (layers := fused_layers(options.layers, text.num_hidden_layers)):
            raise ValueError(f"layers={list(layers)}; its layout cannot name the embeddings, 0: begin at 1")
        known = {"layers": layers, "target_width": text.hidden_size, "draft_vocab": draft_vocab}
        return replace(options, **known, mask_token=cls.placeholder(options, text))

    @classmethod
    def layers_of(cls, options: DflashOptions) -> int:
        return options.blocks

    @property
    def taps(self) -> tuple[int, ...]:
        return self.options.layers

    def fused(self, states: Mapping[int, Tensor]) -> Tensor:
        parts = [states[tap].to(self.fc.weight.device, self.fc.weight.dtype) for tap in self.taps]
        return self.hidden_norm(self.fc(torch.cat(parts, -1)))

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.first(output))

    def read(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        seen = None if mask is None else mask[:, :, -1:]
        return self._blocks(input_ids[:, -1:], position_ids, features, seen, cache)[:, 0]

    def every(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        outputs = self._blocks(input_ids, position_ids, self.first(features), mask, None)
        return nn.functional.pad(outputs[:, :, 0], (1, 0))

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Reads a block after every entry at once; step s is the s-th prediction of each block."""
        mask, ids = text_mask(position_ids), input_ids.roll(-1, 1)
        outputs = self._blocks(ids, position_ids, self.first(features), mask, None)
        for step in range(steps):
            yield nn.functional.pad(outputs[:, :, step], (1, 0))

    def _blocks(
        self, anchors: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """(rows, blocks, k, width) outputs of blocks after the last entries, once the entries are read.

        Args:
            anchors: (rows, blocks) the first token of each block.
            position_ids: (rows, queries) of the entries.
            features: (rows, queries, width) of the entries.
            mask: (rows, 1, blocks, slots) bool: which slots each block sees; None: all.
            cache: keeps keys and values of the entries.
        """
        (rows, count), options = anchors.shape, self.options
        length = options.steps + (not options.from_anchor)
        ids = anchors[..., None].repeat(1, 1, length)  # (rows, blocks, length)
        ids[..., 1:] = options.mask_token
        places = position_ids[:, -count:, None] + torch.arange(1, 1 + length, device=ids.device)  # as ids
        hidden = self.embed_tokens(ids.flatten(1)).to(features.dtype)
        of_text, of_blocks = self.rotary(hidden, position_ids), self.rotary(hidden, places.flatten(1))
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys_and_values(features, of_text)  # type: ignore[operator]
            if cache is not None:
                keys, values = cache.update(keys, values, number)
            hidden = layer(hidden, of_blocks, keys, values, mask)
        outputs = self.norm(hidden).view(rows, count, length, -1)
        return outputs[:, :, length - options.steps :]
