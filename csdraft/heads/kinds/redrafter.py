"""Recurrent Drafter (arXiv 2403.09919): a recurrent cell reads the drafted tokens, beside one hidden state.

The state starts at 0, and each token changes it: s = silu(U s + W e(token) + b). The first token is the one that the
target has chosen. Logits come from [h, s], where h is the target's hidden state of the text's last token: a matrix
joins the two, residual blocks like Medusa's follow, and the output layer is the head's own. The feature of an entry is
[h, s].

The paper searches with beams, and removes the prefixes that beams share before the target reads them. csdraft's trees
need no such step: a node is a prefix, so a shared prefix is drafted and read once. Trees of likely tokens, such as
`BestFirst`, replace the beams, and all verifiers of trees apply. The authors' rule for sampling compares beams with
independent draws; it is not exact, so it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.kinds.medusa import Block

__all__ = ["Redrafter", "RedrafterOptions"]


@dataclass(frozen=True)
class RedrafterOptions(HeadOptions):
    """Keys of `init.redrafter`. All steps have the same weight, as in the authors' code.

    Args:
        layers: residual blocks before the output layer.
    """

    steps: int = 5
    decay: float = 1.0
    layers: int = 2


class Redrafter(Head):
    """Recurrent Drafter."""

    Options = RedrafterOptions

    def __init__(self, config: LlamaConfig, options: RedrafterOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width = config.hidden_size
        self.of_state = nn.Linear(width, width, bias=False)
        self.of_token = nn.Linear(width, width)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(options.layers)])
        self.post_init()

    @property
    def feature_width(self) -> int:
        return 2 * self.config.hidden_size

    def start(self, rows: Tensor) -> None:
        super().start(rows)
        width = self.config.hidden_size
        self.join.weight[:, :width] = torch.eye(width)
        for block in self.blocks:
            block.start()  # type: ignore[operator]

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        hidden, state = features.chunk(2, -1)
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        return torch.cat([hidden, nn.functional.silu(self.of_state(state) + self.of_token(embedded))], -1)

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.join(output)))
