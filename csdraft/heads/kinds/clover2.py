"""Clover-2 (arXiv 2408.00264): one layer reads the text, and a recurrent cell drafts from the layer's output.

Along the text, each hidden state x of the target takes in the next token by regressive attention (from Clover, arXiv
2405.00263): x + c v, where q comes from the norm of x, k and v from the token's embedding, and c is the cosine of q
and k in each attention head. The augmenting block, a decoder layer with a cache, reads the result. It runs for tokens
of the text only. The first token is drafted from norm(W1 x), where x is the block's output. Each drafted token then
changes x by a second regressive attention, and the next is drafted from norm(W2 [x, embedding]). The target's own
output layer reads these normed vectors, and training also compares them with the target's hidden states.

The feature of an entry is x, the normed vector, and how many tokens have been read since the text.
Differences from the authors' code: x starts as the hidden state after the target's last norm (theirs: before it). The
augmenting block has one layer (theirs: two) and starts at random (theirs: as the target's last layer). Tokens have the
target's embeddings (theirs: rows of the output layer). Every position counts (theirs: only where each earlier token is
among the target's likely ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from csdraft.heads.head import Head, HeadOptions, regression
from csdraft.heads.parts import TextLayer

__all__ = ["Clover2", "Clover2Options"]


@dataclass(frozen=True)
class Clover2Options(HeadOptions):
    """Keys of `init.clover2`.

    Args:
        regression: weight of the loss that compares hidden states; `losses` of the recipe weighs the tokens.
    """

    steps: int = 5
    decay: float = 0.7
    regression: float = 10.0


class Regressive(nn.Module):
    """x + c v: how a hidden state takes in a token, see the top of the file."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        made = self.q_proj(self.norm(hidden)), self.k_proj(embedded), self.v_proj(embedded)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in made)  # (..., heads, width / heads)
        return hidden + (nn.functional.cosine_similarity(query, key, dim=-1)[..., None] * value).flatten(-2)


class Clover2(Head):
    """Clover-2."""

    Options = Clover2Options
    attention_layers = 1
    frozen_output = True
    _no_split_modules = ["TextLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: Clover2Options, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width = config.hidden_size
        self.of_text, self.of_draft = Regressive(config), Regressive(config)
        self.augmenting = TextLayer(self.config)  # type: ignore[arg-type]
        self.first = nn.Linear(width, width, bias=False)
        self.later = nn.Linear(2 * width, width, bias=False)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.post_init()

    @property
    def feature_width(self) -> int:
        return 2 * self.config.hidden_size + 1

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        hidden, _, count = features.tensor_split([self.config.hidden_size, -1], -1)
        embedded, drafted = self.embed_tokens(input_ids).to(features.dtype), count > 0  # drafted: (rows, queries, 1)
        taken_in = torch.where(drafted, self.of_draft(hidden, embedded), self.of_text(hidden, embedded))
        hidden = self.augmenting(taken_in, drafted, self.rotary(features, position_ids), mask, cache)
        later = self.later(torch.cat([hidden, embedded], -1))
        return torch.cat([hidden, self.norm(torch.where(drafted, later, self.first(hidden))), count + 1], -1)

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.drafts_from(output))

    def feature_loss(self, outputs: Tensor, features: Tensor) -> Tensor | None:
        return regression(self.options.regression, self.drafts_from(outputs), features[:, : self.config.hidden_size])

    def drafts_from(self, features: Tensor) -> Tensor:
        """(..., width) the vector that the output layer reads."""
        return features[..., self.config.hidden_size : -1]
