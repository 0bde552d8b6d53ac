"""A decoder layer that reads the text only: drafted tokens pass it by, so they cost only the head's small cell.

Hydra++ and Clover-2 have one. It keeps keys and values of the text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from csdraft.decoding.cache_names import cache_name

__all__ = ["TextLayer"]


class TextLayer(nn.Module):
    """A Llama layer and a norm, over the entries of the text."""

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
