"""Placeholders of heads that draft several tokens in one forward: queries beside the text, which no cache keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Beside", "beside_mask"]


class Beside:
    """What attention calls its cache: the first reading of a layer is kept, later ones only see it and one another.

    Args:
        cache: keeps the first reading; None: it is kept for this forward alone.
    """

    def __init__(self, cache: Any = None):
        self.cache = cache
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, slots, head size) each: what the queries may see."""
        if layer in self.held:
            held = self.held[layer]
            return torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)
        self.held[layer] = (
            (keys, values) if self.cache is None else self.cache.update(keys, values, layer, *rest, **more)
        )
        return self.held[layer]

    @property
    def slots(self) -> int:
        """How many slots the first reading left to see."""
        return next(iter(self.held.values()))[0].shape[2]


def beside_mask(mask: Tensor | None, slots: int, count: int, causal: bool, device: torch.device) -> Tensor:
    """(rows, 1, count, slots + count) bool: placeholders see what the last query sees, and one another.

    Args:
        mask: (rows, 1, queries, slots) bool of the queries before; None: the last one sees all slots.
        causal: whether a placeholder sees only those before it, and itself.
    """
    if mask is None:
        mask = torch.ones(1, 1, 1, slots, dtype=torch.bool, device=device)
    last = mask[:, :, -1:].expand(-1, -1, count, -1)
    own = torch.ones(count, count, dtype=torch.bool, device=device)
    own = own.tril() if causal else own
    return torch.cat([last, own.expand(len(last), 1, -1, -1)], -1)
