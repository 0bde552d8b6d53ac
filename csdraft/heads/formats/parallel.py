"""P-EAGLE in the layout of speculators, which vLLM loads: the folders of parallel heads.

csdraft writes them without the embedding, which is the target's; folders of others may hold one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from csdraft.heads.engines import EMBEDDING, ServedTarget, tensor_faults, with_embedding
from csdraft.heads.folder import Names
from csdraft.heads.formats._eagle3_engines import LAYERS, NORMS
from csdraft.heads.formats._speculators import (
    COPIES,
    LAYER,
    MODEL_TYPE,
    PLANS,
    VERSION,
    layout_faults,
    plan,
    t2d_fault,
    value_at,
)
from csdraft.heads.formats.eagle3 import Eagle3Head, numbered
from csdraft.heads.kinds.eagle3 import Eagle3Options, default_layers
from csdraft.heads.kinds.parallel import Parallel, ParallelOptions
from csdraft.heads.stored_head import LAYER_KEYS, StoredHead
from csdraft.stored import fit

__all__ = ["ParallelHead"]

OF_LAYER = ("num_aux_hidden_states", "fc_norm", "norm_output")
"""Keys that vLLM looks for beside those of the layer: it does not take them from outside for this kind of head."""


class ParallelHead(Eagle3Head):
    """A parallel head without its target."""

    what = "parallel head"
    methods = {"vllm": "eagle3", "speculators": "eagle3"}  # noqa: RUF012 - never written to
    # vLLM finds it out by itself only where the folder is served in place of the target (`vllm serve FOLDER`).
    asked_of_vllm = {"parallel_drafting": True}  # noqa: RUF012 - never written to
    complete = Parallel

    @property
    def title(self) -> str:
        return f"parallel head of {self.options.steps} tokens"

    def details(self) -> dict[str, str]:
        options = self.options
        return super().details() | {"layers": f"{options.blocks}, token {options.mask_token} as placeholder"}

    def refusals(self, engine: str, config: Mapping[str, Any]) -> list[str]:
        if engine not in self.methods:
            return ["it reads no folders of speculators"]
        found = list(layout_faults("peagle", engine, config))
        layers, count = config.get(LAYERS) or (0, 0, 0), value_at(config, f"{LAYER}.num_aux_hidden_states")
        if engine == "vllm" and not self.options.qk_norm and (count or 3) != len(layers):
            found.append(f"{LAYER}.num_aux_hidden_states is {count or 3} to it, and {LAYERS} names {len(layers)}")
        if engine == "vllm" and self.options.fc_norm and value_at(config, f"{LAYER}.fc_norm") is not True:
            found.append(f"{LAYER}.fc_norm is missing, where it looks for it: write true")
        if engine == "speculators" and self.options.fc_norm and self.options.norm_before_fc:
            found.append("norm_before_fc and fc_norm are both true, and it takes one of them; use --to vllm")
        if engine == "speculators" and self.options.target_width != self.config.hidden_size:
            found.append(f"target_hidden_size={self.options.target_width} is not hidden_size; use --to vllm")
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name.replace("midlayer.", "layers.0."): shape for name, shape in super().shapes().items()}

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        found = StoredHead.faults(self, engine, config, tensors, target)
        if engine not in self.methods:
            return found
        # As of EAGLE-3 heads, the package does not load the target's embedding as it means to.
        found += tensor_faults(tensors, self.shapes(), {EMBEDDING} if engine == "vllm" else (), COPIES)
        if engine == "speculators" and "d2t" in tensors:
            found += t2d_fault(tensors, self.config.vocab_size)
        if engine == "speculators" and not found:  # vLLM reads the same folder
            found = [f"vLLM: {fault}" for fault in self.faults("vllm", config, tensors, target)]
        return found

    @property
    def deepest(self) -> int:
        return self.options.steps

    def document(self, layers: tuple[int, ...] = ()) -> dict[str, Any]:
        options, document = self.options, super().document(layers)
        keys = {key: document[key] for key in (*LAYER_KEYS, *OF_LAYER)}
        return {
            MODEL_TYPE: "peagle",
            "architectures": ["PEagleSpeculator"],
            "speculators_version": VERSION,
            "tie_word_embeddings": False,
            PLANS: plan("peagle", self.target_name, (), options.steps),
            LAYER: keys | {"num_hidden_layers": options.blocks},
            LAYERS: document.get(LAYERS),
            "mask_token_id": options.mask_token,
            "embed_requires_grad": False,
            **{key: document[key] for key in ("draft_vocab_size", "target_hidden_size", "dtype", *NORMS)},
        }

    def written(self) -> dict[str, Tensor]:
        return numbered(super().written())

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its folder already has the layout: it adds the target's name, and for speculators the target's embedding.

        A head stays the same if it drafts fewer tokens: placeholders do not see later ones.
        """
        document, tensors = self.document(self.options.layers or default_layers(target.layers)), self.written()
        document[PLANS] = plan("peagle", target.name, target.architectures, tokens)
        return document, with_embedding(tensors, target) if engine == "speculators" else tensors

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
