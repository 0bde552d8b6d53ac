"""FSPAD (arXiv 2408.15562): EAGLE-1 with feature sampling and partial alignment.

The paper's formulas could not be had, and there is no public code. What is written here is a reconstruction from its
abstract; weights and widths are chosen, too.

* Feature sampling. The target's feature does not say which token was drawn from it. So the token's embedding chooses
  among the parts of the feature in a wider space: W_down(silu(W_up feature) * sigmoid(W_gate embedding)) stands beside
  the embedding in place of the feature.
* Partial alignment. In EAGLE-1 one vector is fitted to the target's feature and to its distribution, and the two
  disagree. Here the layer's output h is fitted to the feature, and the output layer reads h + W_adapt(silu(h)), which
  is 0 away from h in a new head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from csdraft.heads.eagle import Eagle, EagleOptions

__all__ = ["Fspad", "FspadOptions"]


@dataclass(frozen=True)
class FspadOptions(EagleOptions):
    """Keys of `init.fspad`: those of `EagleOptions`, and two to try each part alone.

    Args:
        expansion: how many times as wide as the feature the space is in which it is sampled; 0: no feature sampling.
        partial_alignment: whether features and logits come from two vectors.
    """

    expansion: int = 2
    partial_alignment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion < 0:
            raise ValueError(f"expansion={self.expansion} of a head must be 0 (no feature sampling) or more")


class Fspad(Eagle):
    """FSPAD as far as it is known."""

    Options = FspadOptions

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
