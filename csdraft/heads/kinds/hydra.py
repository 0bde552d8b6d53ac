"""Hydra (arXiv 2402.05109): Medusa's heads made sequential. Each head also reads the tokens drafted before it.

Head k reads the hidden state of the text's last token and the embeddings of the k tokens after it: the one that the
target has chosen, and k - 1 drafted ones. Its first block, W x + silu(V x + b), turns all of them into one vector.
Further blocks are Medusa's, and the output layer is the head's own. With `prefix` it is Hydra++: a decoder layer first
reads the target's hidden states along the text, and the heads read its output. The paper's heads then have four
layers.

The feature of an entry is the hidden state, the embeddings of up to `steps` tokens, and how many of these have been
read, which chooses the head. W is a matrix, as in the authors' code. In a new head it passes on the hidden state and
little of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.kinds.medusa import Block
from csdraft.heads.parts import Numbered, TextLayer

__all__ = ["Hydra", "HydraOptions"]


@dataclass(frozen=True)
class HydraOptions(HeadOptions):
    """Keys of `init.hydra`; `steps` is the number of heads.

    Args:
        layers: blocks of each head.
        prefix: whether a decoder layer reads the text first (Hydra++).
    """

    layers: int = 1
    prefix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} of a Hydra head; give at least 1: the first joins all vectors")


class Joining(nn.Module):
    """Joins vectors into one: W x + silu(V x + b). A new one passes on the first vector and little of the rest."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.linear = nn.Linear(count * width, width)
        self.residual = nn.Linear(count * width, width, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.residual(vectors) + nn.functional.silu(self.linear(vectors))

    def start(self) -> None:
        width = len(self.residual.weight)
        self.residual.weight[:, :width] = torch.eye(width)
        self.linear.weight.zero_()
        self.linear.bias.zero_()


class Hydra(Numbered, Head):
    """Hydra, and Hydra++ with `prefix`."""

    Options = HydraOptions
    output_layer = False
    _no_split_modules = ["TextLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: LlamaConfig, options: HydraOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width, count = config.hidden_size, len(self.d2t)
        if options.prefix:
            self.prefix = TextLayer(self.config)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(
            nn.Sequential(Joining(head + 2, width), *[Block(width) for _ in range(options.layers - 1)])
            for head in range(options.steps)
        )
        self.outputs = nn.ModuleList(nn.Linear(width, count, bias=False) for _ in range(options.steps))
        self.post_init()

    @classmethod
    def layers_of(cls, options: HydraOptions) -> int:
        return int(options.prefix)

    @property
    def feature_width(self) -> int:
        return (1 + self.options.steps) * self.config.hidden_size + 1

    def start(self, rows: Tensor) -> None:
        for first, *others in self.blocks:  # type: ignore[misc]
            first.start()
            for block in others:
                block.start()
        for output in self.outputs:
            output.weight.copy_(rows)  # type: ignore[operator,union-attr]

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        width, steps = self.config.hidden_size, self.options.steps
        hidden, read, count = features.split([width, steps * width, 1], -1)
        if self.options.prefix:
            hidden = self.prefix(hidden, count > 0, self.rotary(hidden, position_ids), mask, cache)
        embedded = self.embed_tokens(input_ids).to(features.dtype)[..., None, :]  # (rows, queries, 1, width)
        place = torch.arange(steps, device=count.device) == count  # (rows, queries, steps)
        read = torch.where(place[..., None], embedded, read.unflatten(-1, (steps, width)))
        return torch.cat([hidden, read.flatten(-2), count + 1], -1)

    def logits_of(self, number: int, output: Tensor) -> Tensor:
        read = output[:, : (2 + number) * self.config.hidden_size]  # (positions, (2 + number) width)
        return self.outputs[number](self.blocks[number](read))
