"""P-EAGLE in the layout of speculators, which vLLM loads: the folders of parallel heads.

csdraft writes them without the embedding, which is the target's; folders of others may hold one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from csdraft.heads.engines import Found, ServedTarget
from csdraft.heads.folder import Names
from csdraft.heads.formats._speculators import COPIES, LAYER, MODEL_TYPE, PLANS, speculators_document
from csdraft.heads.formats.eagle3 import OF_HEAD, Eagle3Head, numbered
from csdraft.heads.kinds.eagle3 import Eagle3Options, default_layers
from csdraft.heads.kinds.parallel import Parallel, ParallelOptions
from csdraft.heads.stored_head import LAYER_KEYS
from csdraft.stored import fit

__all__ = ["ParallelHead"]

OF_LAYER = ("num_aux_hidden_states", "fc_norm", "norm_output")
"""Keys that vLLM looks for beside those of the layer: it does not take them from outside for this kind of head."""


class ParallelHead(Eagle3Head):
    """A parallel head without its target."""

    what, complete = "parallel head", Parallel
    methods = {"vllm": "eagle3", "speculators": "peagle"}  # noqa: RUF012 - never written to
    # vLLM finds it out by itself only where the folder is served in place of the target (`vllm serve FOLDER`).
    asked_of_vllm = {"parallel_drafting": True}  # noqa: RUF012 - never written to

    @property
    def title(self) -> str:
        return f"parallel head of {self.options.steps} tokens"

    def details(self) -> dict[str, str]:
        options = self.options
        return super().details() | {"layers": f"{options.blocks}, token {options.mask_token} as placeholder"}

    def places(self, engine: str, said: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        right: dict[str, Sequence[Any]] = {}
        if engine == "vllm" and not self.options.qk_norm:
            right[f"{LAYER}.num_aux_hidden_states"] = [self._fused, *[None] * (self._fused == 3)]
        if engine == "vllm" and self.options.fc_norm:  # it looks for it there
            right[f"{LAYER}.fc_norm"] = [True]
        return right

    def as_read(self, engine: str, tensors: Mapping[str, Tensor]) -> Found:
        return (*super().as_read(engine, tensors)[:2], COPIES)

    @property
    def deepest(self) -> int:
        return self.options.steps

    def document(
        self,
        layers: tuple[int, ...] = (),
        target: str | None = None,
        architectures: Sequence[str] = (),
        tokens: int | None = None,
    ) -> dict[str, Any]:
        options, document = self.options, super().document(layers)
        layer = {key: document[key] for key in (*LAYER_KEYS, *OF_LAYER)} | {"num_hidden_layers": options.blocks}
        own = {key: document.get(key) for key in (*OF_HEAD, "dtype")}
        own |= {"mask_token_id": options.mask_token, "embed_requires_grad": False}
        serves = target or self.target_name, architectures, tokens or options.steps
        return speculators_document("peagle", "PEagleSpeculator", layer, *serves, **own)

    def written(self) -> dict[str, Tensor]:
        return numbered(super().written())

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its folder already has the layout: it adds the target's name.

        A head stays the same if it drafts fewer tokens: placeholders do not see later ones.
        """
        layers = self.options.layers or default_layers(target.layers)
        return self.document(layers, target.name, target.architectures, tokens), self.written()

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return config.get(MODEL_TYPE) == "peagle"

    @classmethod
    def options_of(
        cls, document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]
    ) -> ParallelOptions:
        shared = super().options_of({**document, "num_hidden_layers": 1}, state, at, assumed)
        said = fit(document.get(PLANS) or {}, dict[str, Any], f"{at}: {PLANS}")
        plans = fit(said.get("proposal_methods") or [{}], list[dict[str, Any]], f"{at}: {PLANS}: proposal_methods")
        steps = fit(plans[0].get("speculative_tokens"), int, f"{at}: {PLANS}: speculative_tokens")
        blocks = fit(document.get("num_hidden_layers", 1), int, f"{at}: num_hidden_layers")
        mask = fit(document.get("mask_token_id"), int, f"{at}: mask_token_id")
        if steps < 1 or blocks < 1 or not 0 <= mask < document["vocab_size"]:
            raise ValueError(
                f"{at}: speculative_tokens={steps}, num_hidden_layers={blocks}, mask_token_id={mask}; it drafts 1 "
                f"token or more with 1 layer or more, and its mask token is below {document['vocab_size']}"
            )
        own = {field.name: getattr(shared, field.name) for field in fields(Eagle3Options)}
        return ParallelOptions(**own | {"steps": steps}, mask_token=mask, blocks=blocks)
