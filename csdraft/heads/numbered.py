"""What heads share that have an output layer of their own for each drafted token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Numbered"]


class Numbered:
    """A mixin of heads that draft `options.steps` tokens, each with another output layer.

    The last number of a head's output says how many tokens have been read since the text, and chooses the layer.
    """

    options: Any
    d2t: Tensor

    @property
    def deepest(self) -> int:
        return self.options.steps

    def logits_of(self, number: int, output: Tensor) -> Tensor:
        """(positions, draft vocab) logits of one output layer.

        Args:
            number: of the layer, from 0.
            output: (positions, feature width).
        """
        raise NotImplementedError

    def draft_logits(self, output: Tensor) -> Tensor:
        number = output[..., -1].long().clamp(max=self.deepest) - 1  # (...)
        logits = output.new_empty(*output.shape[:-1], len(self.d2t))
        for one in number.unique().tolist():
            logits[number == one] = self.logits_of(one, output[number == one])
        return logits
