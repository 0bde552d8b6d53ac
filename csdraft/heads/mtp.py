"""The next-token module that a target carries itself (multi-token prediction: DeepSeek-V3, arXiv 2412.19437).

Entry i joins norm(embedding of token i + 1) and norm(hidden state of token i) by one matrix. A decoder layer of the
target's own class reads that, and after a norm the target's output layer makes the logits of token i + 2. The hidden
state is the one after the target's last norm. While the module drafts on its own, it is the module's output after its
own norm. Transformers' `generate(use_mtp=True)` does both in the same way. One module drafts any number of tokens so,
though it was mostly trained for the first.

The module is transformers' `MtpLayer`; `csdraft/heads/mtp_files.py` reads its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.decoding.cache_names import cache_name
from csdraft.heads.head import Head, HeadOptions

__all__ = ["Mtp"]


class Mtp(Head):
    """A target's module as a head.

    Args:
        config: of the module, which is one of the target's class with a layer.
        module: a `MtpLayer`.
        rotary: makes the rotary embedding, of the target's class.
        kind: of layer, if the rotary embedding wants to know it.
        window: it sees this many entries, itself included; None: all. A draft must be less deep than that.
    """

    attention_layers = 1
    frozen_output = True

    def __init__(self, config: Any, module: nn.Module, rotary: nn.Module, kind: str | None, window: int | None):
        super().__init__(config, HeadOptions())
        if window is not None:  # which is seen to here, not by the cache
            self.config.layer_types = self.config.sliding_window = None
        self.module, self.rotary, self.kind, self.window = module, rotary, kind, window
        self._cache_name = cache_name(type(module).forward) or ""

    @property
    def deepest(self) -> int | None:
        return None if self.window is None else self.window - 1

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """How experts run is the target's choice, as its config says."""
        return True

    def unrolled(self, *_: Any) -> Iterator[Tensor]:
        raise ValueError("a target's own next-token module is not trained by csdraft; train a head: init={...}")

    def make_buffers(self) -> None:
        """The rotary embedding is given."""

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        kind = {} if self.kind is None else {"layer_type": self.kind}
        mask = mask if self.window is None else near(mask, position_ids, cache, self.window)
        rotary = self.rotary(embedded, position_ids=position_ids, **kind)
        places = {"position_ids": position_ids, self._cache_name: cache}
        return self.module(embedded, features, position_embeddings=rotary, attention_mask=mask, **places)

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(output)


def near(mask: Tensor | None, positions: Tensor, cache: Any, window: int) -> Tensor:
    """(rows, 1, queries, slots) bool: what entries see within the window.

    Slot i holds entry i of the text. Drafted entries may stand further behind than they are, but never too far:
    the window is longer than a draft.
    """
    own, keys = positions[..., None], positions[:, None]  # (rows, queries, 1), (rows, 1, slots)
    if cache is not None:
        slots = cache.get_mask_sizes(positions.shape[1], 0)[0] if mask is None else mask.shape[-1]
        keys = torch.arange(slots, device=positions.device)[None, None]
    mask = (keys <= own)[:, None] if mask is None else mask
    seen = mask & (keys > own - window)[:, None]
    return seen | (~seen.any(-1, keepdim=True) & mask)  # a padding query must see something
