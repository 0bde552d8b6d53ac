"""The layout of the package speculators, which vLLM reads, too: what it requires of every kind of head.

config.json holds the config of the head's layers in a document of its own, `transformer_layer_config`. It says in
`speculators_config` which target the head is for, and how many tokens are drafted. vLLM raises an error without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COPIES", "LAYER", "MODEL_TYPE", "PLANS", "layout_places", "missing_places", "speculators_document", "t2d_fault",
    "value_at",
]  # fmt: skip

MODEL_TYPE, PLANS, LAYER = "speculators_model_type", "speculators_config", "transformer_layer_config"
VERSION = "0.9.0"
"""The version of speculators whose layout is written."""
COPIES = frozenset({"t2d", "verifier_norm.weight", "verifier_lm_head.weight"})
"""Tensors that say what `d2t` says, and copies of the target's."""
NEEDED = (f"{PLANS}.proposal_methods[0].speculative_tokens", f"{PLANS}.verifier.name_or_path")
"""Places in config.json that vLLM reads."""
ARCHITECTURES = f"{PLANS}.verifier.architectures"
"""Where the package reads a list."""
OF_PACKAGE = {
    f"{PLANS}.default_proposal_method": ["greedy"],
    f"{PLANS}.proposal_methods[0].proposal_type": ["greedy"],
}
"""Places that the package speculators reads as well, and what they must hold."""


def speculators_document(
    kind: str,
    architecture: str,
    layer: Mapping[str, Any],
    target: str | None,
    architectures: Sequence[str],
    tokens: int,
    **own: Any,
) -> dict[str, Any]:
    """A config.json in this layout.

    Args:
        kind, architecture: the package's names for such heads.
        layer: the config of its layers.
        target: the name of the model that it drafts for, which vLLM and the package load.
        architectures: the target's.
        tokens: how many are drafted per round.
        own: other keys, of this kind of head.
    """
    return own | {
        "architectures": [architecture],
        MODEL_TYPE: kind,
        "speculators_version": VERSION,
        "tie_word_embeddings": False,
        LAYER: dict(layer),
        PLANS: {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"architectures": list(architectures), "name_or_path": target},
        },
    }


def value_at(config: Mapping[str, Any], place: str) -> Any:
    """The value at a place of config.json such as `a.b[0].c`; None if there is none."""
    found: Any = config
    for key in re.findall(r"\w+", place):
        if isinstance(found, list):
            found = dict(enumerate(found)).get(int(key)) if key.isdigit() else None
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return found


def layout_places(kind: str, engine: str) -> dict[str, list[str]]:
    """Places that an engine reads, and what they must hold; see `ServedHead.places`.

    Args:
        kind: the package's name for such heads.
        engine: vllm or speculators.
    """
    of_package = {f"{PLANS}.algorithm": [kind]} | OF_PACKAGE if engine == "speculators" else {}
    return {MODEL_TYPE: [kind]} | of_package


def missing_places(kind: str, engine: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Places that must hold something, and do not; see `layout_places`."""
    needed = [*NEEDED, *["norm_before_residual"] * (kind == "eagle3")]  # without it vLLM takes true, speculators false
    needed += ["draft_vocab_size"] * (engine == "speculators")
    yield from (place for place in needed if value_at(config, place) is None)
    if engine == "speculators" and not isinstance(value_at(config, ARCHITECTURES), list):
        yield ARCHITECTURES


def t2d_fault(tensors: Mapping[str, Tensor], vocab: int) -> Iterator[str]:
    """The package reads `t2d` beside `d2t`: (vocab,) whether a token can be drafted."""
    if "d2t" not in tensors:
        return
    drafted, t2d = tensors["d2t"] + torch.arange(len(tensors["d2t"])), tensors.get("t2d")  # (draft vocab,), (vocab,)
    if t2d is None or t2d.shape != (vocab,) or t2d.nonzero()[:, 0].tolist() != drafted.sort().values.tolist():
        yield f"t2d must be true for the {len(drafted)} tokens of d2t, of {vocab}"
