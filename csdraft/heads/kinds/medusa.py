"""Medusa-1 (arXiv 2401.10774): independent heads on the last hidden state, one for each of the next positions.

The target's own output layer is about to choose a token. Head k predicts the token k + 1 places after it, whatever is
drafted in between: a residual block, x + silu(W x + b), and an output layer of its own.

The feature of an entry is the hidden state of the text's last token and a number: how many tokens have been drafted
since then. The number chooses the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.parts import Numbered

__all__ = ["Medusa", "MedusaOptions"]


@dataclass(frozen=True)
class MedusaOptions(HeadOptions):
    """Keys of `init.medusa`; `steps` is the number of heads.

    Args:
        layers: residual blocks of each head.
    """

    layers: int = 1


class Block(nn.Module):
    """x + silu(W x + b); W and b are 0 in a new head, which thus starts as the target's output layer."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))

    def start(self) -> None:
        self.linear.weight.zero_()
        self.linear.bias.zero_()


class Medusa(Numbered, Head):
    """Medusa-1. Modules have the names of published checkpoints."""

    Options = MedusaOptions
    layout = "medusa"
    output_layer = False

    def __init__(self, config: LlamaConfig, options: MedusaOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width, count = config.hidden_size, len(self.d2t)
        self.medusa_head = nn.ModuleList(
            nn.Sequential(*[Block(width) for _ in range(options.layers)], nn.Linear(width, count, bias=False))
            for _ in range(options.steps)
        )
        self.post_init()

    @property
    def feature_width(self) -> int:
        return self.config.hidden_size + 1

    def start(self, rows: Tensor) -> None:
        for head in self.medusa_head:
            head[-1].weight.copy_(rows)  # type: ignore[index,union-attr,operator]
            for block in head[:-1]:  # type: ignore[index]
                block.start()

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        return torch.cat([features[..., :-1], features[..., -1:] + 1], -1)

    def logits_of(self, number: int, output: Tensor) -> Tensor:
        return self.medusa_head[number](output[:, :-1])
