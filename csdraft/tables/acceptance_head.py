"""An acceptance head: a small network that predicts whether a drafted token is kept if all tokens before it are.

SpecDec++ (arXiv 2405.19715) reads the drafter's hidden state. This head reads three numbers that every model drafter
has: the token's log confidence, the distribution's entropy, and the token's place in the draft. So it does not touch
the model, costs microseconds on the host, and works for any stage of a cascade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from csdraft.tables._file import ArrayTable

__all__ = ["AcceptanceHead"]

FEATURES = 3
LEAST = 1e-9
PARTS = ("mean", "scale", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, eq=False)
class AcceptanceHead(ArrayTable):
    """sigmoid(w2 . silu(w1 x + b1) + b2) of the standardised features x.

    Attributes:
        mean, scale: (features,) each feature is standardised as (x - mean) / scale.
        w1, b1: (hidden, features), (hidden,).
        w2, b2: (hidden,), ().
    """

    format: ClassVar = "csdraft-acceptance-head-1"
    stored: ClassVar = {name: ("F32", 2 if name == "w1" else 1) for name in PARTS}
    way_out: ClassVar = "train a head: csdraft.trainers.stop_head"

    mean: np.ndarray
    scale: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "b2", np.squeeze(self.b2))  # files hold it as (1,)
        super().__post_init__()
        hidden = len(self.b1)
        wanted = [(FEATURES,), (FEATURES,), (hidden, FEATURES), (hidden,), (hidden,), ()]
        shapes = [getattr(self, name).shape for name in PARTS]
        if shapes != wanted:
            raise ValueError(f"an acceptance head's parts {PARTS} have shapes {shapes}; expected {wanted}")
        for name in PARTS:
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"an acceptance head's {name} has numbers that are not finite; train it again")
        if not self.scale.all():
            raise ValueError("an acceptance head's scale, by which features are divided, must not be 0")

    @staticmethod
    def features(confidence: float, entropy: float, depth: int) -> tuple[float, float, float]:
        """The features of a token; `depth` is 0 for a draft's first token."""
        return math.log(max(confidence, LEAST)), entropy, math.log1p(depth)

    def __call__(self, confidence: float, entropy: float, depth: int) -> float:
        """The predicted probability that the token is kept, given that all tokens before it are."""
        x = (np.array(self.features(confidence, entropy, depth), dtype=np.float32) - self.mean) / self.scale
        inner = self.w1 @ x + self.b1  # (hidden,)
        return float(1 / (1 + np.exp(-(self.w2 @ (inner / (1 + np.exp(-inner))) + self.b2))))
