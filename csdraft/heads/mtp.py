"""The next-token module that a target carries itself (multi-token prediction: DeepSeek-V3, arXiv 2412.19437).

Entry i joins norm(embedding of token i + 1) and norm(hidden state of token i) by one matrix. A decoder layer of the
target's own class reads that, and after a norm the target's output layer makes the logits of token i + 2. The hidden
state is the one after the target's last norm. While the module drafts on its own, it is the module's output after its
own norm. Transformers' `generate(use_mtp=True)` does both in the same way. One module drafts any number of tokens so,
though it was mostly trained for the first.

The module is transformers' `MtpLayer`; `csdraft/heads/mtp_files.py` reads its weights.
"""

from __future__ import annotations

from typing import Any

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
        by_kind: whether that wants to know the kind of layer.
    """

    attention_layers = 1
    frozen_output = True

    def __init__(self, config: Any, module: nn.Module, rotary: nn.Module, by_kind: bool):
        super().__init__(config, HeadOptions())
        self.module, self.rotary, self._by_kind = module, rotary, by_kind
        self._cache_name = cache_name(type(module).forward) or ""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """How experts run is the target's choice, as its config says."""
        return True

    def make_buffers(self) -> None:
        """The rotary embedding is given."""

    def output(
        self, input_ids: Tensor, position_ids: Tensor, features: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids).to(features.dtype)
        kind = {"layer_type": self.config.layer_types[0]} if self._by_kind else {}
        rotary = self.rotary(embedded, position_ids=position_ids, **kind)
        places = {"position_ids": position_ids, self._cache_name: cache}
        return self.module(embedded, features, position_embeddings=rotary, attention_mask=mask, **places)

    def draft_logits(self, output: Tensor) -> Tensor:
        return self.lm_head(output)
