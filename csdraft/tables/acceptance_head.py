"""An acceptance head: a small network that predicts how likely a drafted token is kept if all before it are.

SpecDec++ (arXiv 2405.19715) reads the drafter's hidden state. This head reads three numbers that every drafter with a
distribution has: the token's log confidence, the distribution's entropy, and the token's place in the draft. So it
does not touch the model, costs microseconds on the host, and works for any stage of a cascade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from csdraft.stored import naming
from csdraft.tables._file import read_arrays

__all__ = ["AcceptanceHead"]

FORMAT = "csdraft-acceptance-head-1"
FEATURES = 3
LEAST = 1e-9
PARTS = ("mean", "scale", "w1", "b1", "w2", "b2")
STORED = {name: ("F32", 2 if name == "w1" else 1) for name in PARTS}


@dataclass(frozen=True, eq=False)
class AcceptanceHead:
    """sigmoid(w2 . silu(w1 x + b1) + b2) of the standardised features; an immutable value.

    Attributes:
        mean, scale: (features,) each feature is standardised as (x - mean) / scale.
        w1, b1: (hidden, features), (hidden,).
        w2, b2: (hidden,), ().
    """

    mean: np.ndarray
    scale: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray

    def __post_init__(self) -> None:
        for name in PARTS:
            values = np.array(getattr(self, name), dtype=np.float32)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
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
        """What the head reads about a token: `depth` is 0 for a draft's first."""
        return math.log(max(confidence, LEAST)), entropy, math.log1p(depth)

    def __call__(self, confidence: float, entropy: float, depth: int) -> float:
        """Predicted probability that the token is kept, given that all before it are."""
        x = (np.array(self.features(confidence, entropy, depth), dtype=np.float32) - self.mean) / self.scale
        inner = self.w1 @ x + self.b1  # (hidden,)
        return float(1 / (1 + np.exp(-(self.w2 @ (inner / (1 + np.exp(-inner))) + self.b2))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AcceptanceHead):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in PARTS)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name).tobytes() for name in PARTS))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, which `load` reads."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.atleast_1d(getattr(self, name)) for name in PARTS}, path, {"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> AcceptanceHead:
        """A head from the file that `save` wrote; ValueError for any other file."""
        parts, _ = read_arrays(path, FORMAT, STORED, "train a head: csdraft.trainers.stop_head")
        with naming(path):
            return cls(**{**parts, "b2": parts["b2"].reshape(())})
