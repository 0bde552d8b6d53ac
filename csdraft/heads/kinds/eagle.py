"""EAGLE-1 (arXiv 2401.15077): one decoder layer that predicts the target's next feature.

The feature is what the target's output layer reads: the last hidden state, after the last norm. Entry i joins the
embedding of token i + 1 and the feature of token i by one matrix. A Llama layer without an input norm turns that into
a prediction of the feature of token i + 1, and the target's own output layer gives the logits of token i + 2. In a
draft the predicted feature replaces the target's.

Training compares the distributions, and the features themselves (SmoothL1). It adds noise to the features that the
head reads, since those of a draft are never exact. The original code makes the noise smaller in longer texts; here it
does not depend on the length, because rows are packed. EAGLE-2 (arXiv 2406.16858) drafts trees with the same module.

Modules have the names of published checkpoints, which `csdraft/heads/formats/eagle.py` reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from csdraft.decoding.cache_names import cache_name
from csdraft.heads.head import Head, HeadOptions, regression

__all__ = ["Eagle", "EagleOptions"]


@dataclass(frozen=True)
class EagleOptions(HeadOptions):
    """Keys of `init.eagle`.

    Args:
        regression: weight of the distance between predicted and true features, SmoothL1 averaged over the width.
            `losses` of the recipe weighs the distributions; the paper's ratio is 1 to 0.1.
        noise: training adds uniform noise from -noise to noise to the target's features that the head reads.
        bias: whether the matrix that joins embedding and feature has a bias. SGLang loads only heads with one, vLLM
            only heads without.
    """

    steps: int = 1
    regression: float = 1.0
    noise: float = 0.1
    bias: bool = False


class Eagle(Head):
    """EAGLE-1."""

    Options = EagleOptions
    layout = "eagle"
    attention_layers = 1
    frozen_output = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: EagleOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=options.bias)
        layer = LlamaDecoderLayer(self.config, 0)  # type: ignore[arg-type]
        layer.input_layernorm = nn.Identity()  # type: ignore[assignment]
        self.layers = nn.ModuleList([layer])
        self._cache_name = cache_name(LlamaDecoderLayer.forward) or ""
        self.post_init()

    def joined(self, embedded: Tensor, features: Tensor) -> Tensor:
        """(rows, queries, width) what the layer reads, from embeddings and features of the same shape."""
        return self.fc(torch.cat([embedded, features], -1))

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        joined = self.joined(self.embed_tokens(input_ids).to(features.dtype), features)
        places = {"position_embeddings": self.rotary(joined, position_ids), self._cache_name: cache}
        return self.layers[0](joined, attention_mask=mask, **places)

    def feature_loss(self, outputs: Tensor, features: Tensor) -> Tensor | None:
        return regression(self.options.regression, outputs, features)

    def unrolled(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        if self.training and self.options.noise:
            features = features + self.options.noise * (2 * torch.rand_like(features) - 1)
        return super().unrolled(input_ids, position_ids, features, steps)
