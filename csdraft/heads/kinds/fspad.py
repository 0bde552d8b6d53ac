"""FSPAD (arXiv 2408.15562): EAGLE-1 with feature sampling and partial alignment.

The paper's formulas were not available, and there is no public code. This file is a reconstruction from the abstract;
weights and widths are our choice.

* Feature sampling. The target's feature does not say which token was drawn from it. So the token's embedding selects
  parts of the feature in a wider space: W_down(silu(W_up feature) * sigmoid(W_gate embedding)) replaces the feature
  beside the embedding.
* Partial alignment. In EAGLE-1 one vector is fitted to both the target's feature and its distribution, and the two
  disagree. Here the layer's output h is fitted to the feature, and the output layer reads h + W_adapt(silu(h)). In a
  new head W_adapt is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from csdraft.heads.kinds.eagle import Eagle, EagleOptions

__all__ = ["Fspad", "FspadOptions"]


@dataclass(frozen=True)
class FspadOptions(EagleOptions):
    """Keys of `init.fspad`: those of `EagleOptions`, and two that switch the parts on and off.

    Args:
        expansion: width of the space in which the feature is sampled, in widths of the feature; 0: no sampling.
        partial_alignment: whether features and logits come from two vectors.
    """

    expansion: int = 2
    partial_alignment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion < 0:
            raise ValueError(f"expansion={self.expansion} of a head must be 0 (no feature sampling) or more")


class Fspad(Eagle):
    """FSPAD, reconstructed."""

    Options = FspadOptions
    layout = "own"  # no serving engine has one for it

    def __init__(self, config: LlamaConfig, options: FspadOptions, draft_vocab: int | None = None):
        super().__init__(config, options, draft_vocab)
        width, wide = config.hidden_size, options.expansion * config.hidden_size
        if wide:
            self.up, self.gate = nn.Linear(width, wide, bias=False), nn.Linear(width, wide, bias=False)
            self.down = nn.Linear(wide, width, bias=False)
        if options.partial_alignment:
            self.adapt = nn.Linear(width, width, bias=False)
        self.post_init()

    def start(self, rows: Tensor) -> None:
        super().start(rows)
        if self.options.partial_alignment:
            self.adapt.weight.zero_()

    def joined(self, embedded: Tensor, features: Tensor) -> Tensor:
        if self.options.expansion:
            chosen = torch.sigmoid(self.gate(embedded))
            features = self.down(nn.functional.silu(self.up(features)) * chosen)
        return super().joined(embedded, features)

    def draft_logits(self, output: Tensor) -> Tensor:
        if self.options.partial_alignment:
            output = output + self.adapt(nn.functional.silu(output))
        return super().draft_logits(output)
