"""P-EAGLE in the layout of speculators, which vLLM loads: the folders of parallel heads.

csdraft writes them without the embedding, which is the target's; folders of others may hold one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from csdraft.heads.engines import ServedTarget, with_embedding
from csdraft.heads.folder import Names
from csdraft.heads.formats._eagle3_engines import LAYERS, NORMS, SPECULATORS
from csdraft.heads.formats.eagle3 import Eagle3Head, numbered
from csdraft.heads.kinds.eagle3 import Eagle3Options, default_layers
from csdraft.heads.kinds.parallel import Parallel, ParallelOptions
from csdraft.heads.stored_head import LAYER_KEYS, StoredHead
from csdraft.stored import fit

__all__ = ["ParallelHead"]

MODEL_TYPE, PLANS = "speculators_model_type", "speculators_config"


class ParallelHead(Eagle3Head):
    """A parallel head without its target."""

    what = "parallel head"
    methods = {"vllm": "eagle3", "speculators": "eagle3"}  # noqa: RUF012 - never written to
    complete = Parallel
    faults = StoredHead.faults

    @property
    def title(self) -> str:
        return f"parallel head of {self.options.steps} tokens"

    def details(self) -> dict[str, str]:
        options = self.options
        return super().details() | {"layers": f"{options.blocks}, token {options.mask_token} as placeholder"}

    def refusals(self, engine: str, config: Mapping[str, Any]) -> list[str]:
        return [] if engine in self.methods else ["it reads no folders of speculators"]

    @property
    def deepest(self) -> int:
        return self.options.steps

    def document(self, layers: tuple[int, ...] = ()) -> dict[str, Any]:
        options, document = self.options, super().document(layers)
        plan = {"proposal_type": "greedy", "speculative_tokens": options.steps}
        return {
            MODEL_TYPE: "peagle",
            "architectures": ["PEagleSpeculator"],
            PLANS: {
                "algorithm": "peagle",
                "default_proposal_method": "greedy",
                "proposal_methods": [plan | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": {"name_or_path": self.target_name, "architectures": []},
            },
            SPECULATORS: {key: document[key] for key in LAYER_KEYS} | {"num_hidden_layers": options.blocks},
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
        document[PLANS]["proposal_methods"][0]["speculative_tokens"] = tokens
        document[PLANS]["verifier"] = {"name_or_path": target.name, "architectures": list(target.architectures)}
        return document, with_embedding(tensors, target) if engine == "speculators" else tensors

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return config.get(MODEL_TYPE) == "peagle"

    @classmethod
    def options_of(
        cls, document: Mapping[str, Any], state: Mapping[str, Tensor], at: str, assumed: list[str]
    ) -> ParallelOptions:
        shared = super().options_of({**document, "num_hidden_layers": 1}, state, at, assumed)
        plan = fit(document.get(PLANS) or {}, dict[str, Any], f"{at}: {PLANS}")
        plans = fit(plan.get("proposal_methods") or [{}], list[dict[str, Any]], f"{at}: {PLANS}: proposal_methods")
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
