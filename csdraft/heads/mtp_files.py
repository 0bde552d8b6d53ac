"""The next-token module of a target on disk: tensors of the target's own folder, which its class leaves unread.

They are named `model.layers.N` with N from the number of the target's layers on (DeepSeek-V3, GLM-4.5), or `mtp`
(Mellum, in the layout of Qwen3-Next). Which tensor is which, and how experts are put together, is transformers' own
conversion (`MtpModel`). Embedding and output layer are the target's; copies of them in the folder are not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from csdraft.decoding.traits import FULL, SLIDING
from csdraft.heads.folder import read_chosen
from csdraft.heads.head import Head
from csdraft.heads.layers import check_whole, embeddings
from csdraft.heads.mtp import Mtp
from csdraft.heads.on_target import OnTarget, called
from csdraft.heads.self_draft import MTP, write_document

__all__ = ["OWN", "OwnModule"]

SOME = 4
"""Names of tensors that a message lists."""
NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class OwnModule(OnTarget):
    """The module of whatever target it is bound to, read from that target's folder when it is."""

    what, use = "drafter", "is the next-token module of a target"

    def __init__(self) -> None:
        config: Any = PreTrainedConfig  # its fields are not typed
        super().__init__(config(name_or_path=MTP), {})

    def check(self, target: Any) -> None:
        """Raises ValueError if a target has no such module, or one that csdraft cannot draft with."""
        config = target.config.get_text_config(decoder=True)
        count = getattr(config, "num_mtp_layers", None) or 0
        if not count:
            raise ValueError(
                f"{called(target)} has no next-token modules that transformers knows: its config has no "
                f"num_mtp_layers; draft with another drafter than {MTP!r}"
            )
        if count > 1:
            raise ValueError(
                f"{called(target)} has num_mtp_layers={count}, one module for each drafted token; csdraft drafts with "
                "one module that is used again and again"
            )
        if (kind := _kind(config)) not in (FULL, SLIDING):
            raise ValueError(
                f"{called(target)} has a next-token module of kind {kind}, and csdraft drafts with those of kinds "
                f"{FULL} and {SLIDING}"
            )

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Head:
        check_whole(target)
        theirs = embeddings(target)
        table = theirs["input.weight"]
        dtype = table.dtype if table.dtype.is_floating_point else torch.float32
        made = _read(target, dtype, table.device)
        rotary = type(made.rotary_emb)(made.config).to(
            table.device
        )  # the target's may lack the module's kind of layer
        kind = _kind(target.config.get_text_config(decoder=True))
        window = made.config.sliding_window if kind == SLIDING else None
        with torch.device("meta"):
            head = Mtp(made.config, made.layers[0], rotary, kind if made.has_per_layer_rope else None, window)
        head.d2t = torch.zeros(len(head.d2t), dtype=torch.long, device=table.device)
        head.lent = {"embed_tokens.weight": "input.weight", "lm_head.weight": "output.weight"}
        for name, source in head.lent.items():
            lent = theirs.get(source, table)  # an output layer may be the embedding
            head.get_submodule(name.partition(".")[0]).weight = nn.Parameter(lent.detach(), requires_grad=False)
        head.stored_by = OwnModule
        head.config._name_or_path = MTP
        return head.requires_grad_(False).eval()

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        raise ValueError(f"{MTP!r} is a part of the target, which csdraft does not train; train a head: init={{...}}")

    # On disk: a note that the target has it.

    @classmethod
    def of(cls, head: Any, state_dict: Any = None) -> OwnModule:
        return OWN

    def save(self, folder: str | Path) -> None:
        """Writes a drafter.json: the weights are in the target's folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_document(folder, MTP, {})


OWN = OwnModule()
"""The only one: it keeps the modules of all targets that it is bound to."""


def _read(target: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' `MtpModel` of a target; ValueError for tensors that are missing, unknown or of another shape."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_layers import MtpModel
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.generic import ContextManagers

    path, count = target.config.name_or_path, target.config.get_text_config(decoder=True).num_hidden_layers
    if not path:
        raise ValueError(f"{called(target)} does not say where it was loaded from: load it by from_pretrained")
    state = read_chosen(path, lambda name: _chosen(name, count), revision=getattr(target.config, "_commit_hash", None))
    if not state:
        raise ValueError(
            f"{path!r} has none of the tensors of its next-token module (mtp.* or layers.{count}.*), which copies of "
            "a model often lack: get its original weights"
        )
    contexts: list[Any] = MtpModel.get_init_context(dtype, False, False, None)
    with ContextManagers(contexts):
        made: Any = MtpModel(target, 1)
    made.config._attn_implementation = "sdpa"  # which reads csdraft's masks
    how = LoadStateDictConfig(weight_mapping=made.get_weight_conversions(target), device_map={"": device}, dtype=dtype)
    found, _ = convert_and_load_state_dict_in_model(model=made, state_dict=state, load_config=how)
    made._adjust_missing_and_unexpected_keys(found)
    wrong = {
        "lacks": found.missing_keys,
        "has tensors that transformers does not know for such a module:": found.unexpected_keys,
        "has tensors of another shape than its config.json asks for:": {key for key, *_ in found.mismatched_keys},
        "has tensors that cannot be put together:": set(found.conversion_errors),
    }
    for says, names in wrong.items():
        if names:
            raise ValueError(f"{path!r} {says} {', '.join(sorted(names)[:SOME])} (next-token module)")
    return made


def _kind(config: Any) -> str:
    """Of a target's config, the kind of attention of its module."""
    return (getattr(config, "mtp_layer_types", None) or (FULL,))[0]


def _chosen(name: str, count: int) -> bool:
    """Whether a tensor of a target with so many layers is of its next-token module."""
    number = NUMBERED.search(name)
    return name.startswith(f"{MTP}.") or (number is not None and int(number[1]) >= count)
