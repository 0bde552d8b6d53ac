"""Parallel heads on disk: P-EAGLE folders in the layout of speculators, which vLLM loads.

csdraft writes them without the embedding, which is the target's; folders of others may hold one of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from csdraft.heads.eagle3 import Eagle3Options, default_layers
from csdraft.heads.eagle3_files import EMBEDDING, KEPT, LAYERS, NORMS, SPECULATORS, Eagle3Head
from csdraft.heads.engines import ServedTarget
from csdraft.heads.folder import Names
from csdraft.heads.parallel import Parallel, ParallelOptions
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit

__all__ = ["ParallelHead"]

MODEL_TYPE, PLANS = "speculators_model_type", "speculators_config"


class ParallelHead(Eagle3Head):
    """A parallel head without its target."""

    what = "parallel head"

    @classmethod
    def complete(cls, config: Any, options: Any) -> Parallel:
        return Parallel(config, options)

    def described(self) -> dict[str, str]:
        described, options = super().described(), self.options
        kind = described["kind"].replace("EAGLE-3 head", f"parallel head of {options.steps} tokens")
        return described | {"kind": kind, "layers": f"{options.blocks}, token {options.mask_token} as placeholder"}

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        return {"vLLM": None, "SGLang": "it reads no folders of speculators", "speculators": None}

    @property
    def read_layers(self) -> tuple[int, ...]:
        return self.options.layers

    @property
    def deepest(self) -> int:
        return self.options.steps

    def document(self, layers: tuple[int, ...] = ()) -> dict[str, Any]:
        options, document, layers = self.options, super().document(layers), self.options.layers or layers
        layer = {key: document[key] for key in KEPT} | {"num_hidden_layers": options.blocks}
        base = self.base.name if self.base is not None else None
        plan = {"proposal_type": "greedy", "speculative_tokens": options.steps}
        return {
            MODEL_TYPE: "peagle",
            "architectures": ["PEagleSpeculator"],
            PLANS: {
                "algorithm": "peagle",
                "default_proposal_method": "greedy",
                "proposal_methods": [plan | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": {"name_or_path": base, "architectures": []},
            },
            SPECULATORS: layer,
            LAYERS: list(layers) or None,
            "mask_token_id": options.mask_token,
            "embed_requires_grad": False,
            **{key: document[key] for key in ("draft_vocab_size", "target_hidden_size", "dtype", *NORMS)},
        }

    def written(self) -> dict[str, Tensor]:
        return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in super().written().items()}

    methods = {"vllm": "eagle3", "speculators": "eagle3"}  # noqa: RUF012 - never written to
    faults = StoredHead.faults

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its folder is one of speculators already: the target's name is filled in, for speculators its embedding.

        A head that reads fewer tokens of a draft is the same head: placeholders see none behind them.
        """
        layers = self.options.layers or default_layers(target.layers)
        document, tensors = self.document(layers), self.written()
        document[PLANS]["proposal_methods"][0]["speculative_tokens"] = tokens
        document[PLANS]["verifier"] = {"name_or_path": target.name, "architectures": list(target.architectures)}
        if engine == "speculators" and EMBEDDING not in tensors:
            tensors[EMBEDDING] = target.embedding().to(tensors["fc.weight"].dtype, copy=True)
        return document, tensors

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
