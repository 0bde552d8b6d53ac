"""Why two texts part: a near-tie, whose two tokens rounding alone can swap, or something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from csdraft.cli.check import one_forward, single_steps

__all__ = ["Parting", "parting"]


@dataclass(frozen=True)
class Parting:
    """Where a text leaves plain `generate`'s.

    Attributes:
        at: the first token that differs, counted from 1.
        gap: between the two highest logits there, as plain `generate` sees them; inf where one text only ends earlier.
        rounding: the most by which these logits differ between one forward over the text and single steps.
    """

    at: int
    gap: float
    rounding: float

    @property
    def tied(self) -> bool:
        """Whether rounding alone explains it: both logits may be off by so much."""
        return self.gap <= 2 * self.rounding

    def __str__(self) -> str:
        kind = "a near-tie" if self.tied else "NOT a near-tie"
        return f"token {self.at}, {kind}: top-2 logit gap {self.gap:.2g}, rounding {self.rounding:.2g}"


def parting(target: Any, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]) -> Parting | None:
    """Where and why a text leaves plain `generate`'s; None if it does not.

    Args:
        target: that wrote both.
        prompt, plain, other: token ids; of the texts the new ones.
    """
    if list(plain) == list(other):
        return None
    shorter = min(len(plain), len(other))
    at = next((i for i in range(shorter) if plain[i] != other[i]), shorter)
    if at == shorter:
        return Parting(at + 1, float("inf"), 0.0)
    ids = torch.tensor([list(prompt)], device=target.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text = torch.tensor(list(plain[: at + 1]))
    steps = single_steps(target, inputs, text)  # (at + 1, vocab)
    rounding = float((steps - one_forward(target, inputs, text)).abs().max())
    top = steps[-1].topk(2).values
    return Parting(at + 1, float(top[0] - top[1]), rounding)
