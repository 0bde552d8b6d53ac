"""A drafter cut out of its target that has its own layers and uses the target's embedding and output layer.

The two are a third or more of a small drafter. They are frozen in training and not saved, and the target lends them
again for drafting. On disk it is a Transformers folder without those tensors, and `drafter.json`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csdraft.heads.folder import read_tensors
from csdraft.heads.layers import embedding_fingerprint, embeddings
from csdraft.heads.on_target import OnTarget, frozen, set_parameter
from csdraft.heads.self_draft import DOCUMENT, TIED, Lender, write_document
from csdraft.stored import check_config, fit

__all__ = ["Lender", "TiedDraft", "borrowed", "tie"]


def tie(student: Any, target: Any) -> Any:
    """Freezes the student's copies of the target's embedding and output layer and records whose they are."""
    student.tied_to = Lender.of(target, embedding_fingerprint(target, target.config.vocab_size))
    names = {id(parameter): name for name, parameter in embeddings(student).items()}
    every = student.named_parameters(remove_duplicate=False)
    student.lent = {name: names[id(parameter)] for name, parameter in every if id(parameter) in names}
    student.stored_by = TiedDraft
    for parameter in embeddings(student).values():
        parameter.requires_grad_(False)
    return student


def borrowed(model: Any) -> Mapping[str, str]:
    """The parameters that the target lends to a tied student or a head -> their names in `embeddings`."""
    return vars(model).get("lent", {})


class TiedDraft(OnTarget):
    """A tied drafter without the target's tensors; `bind` completes it.

    Args:
        base: the model whose embedding and output layer it uses; its fingerprint is `embedding_fingerprint`.
        config: of the whole model.
        state: its own tensors.
        lent: names of the target's tensors, see `borrowed`.
    """

    what, use = "tied drafter", "uses a target's embedding and output layer"

    _trained_on = "uses the embedding and output layer of"

    def __init__(self, base: Lender, config: Any, state: Mapping[str, Tensor], lent: Mapping[str, str]):
        super().__init__(config, state)
        self.base, self.lent = base, dict(lent)

    def _fingerprint(self, target: Any) -> str:
        kind = getattr(target.config, "model_type", None)
        return embedding_fingerprint(target, self.base.vocab_size) if kind == self.config.model_type else str(kind)

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        """See `OnTarget.open`; it holds copies of the target's tensors."""
        self.check(target)
        theirs = embeddings(target)
        copies = {name: theirs[key].detach().to(dtype, copy=True) for name, key in self.lent.items()}
        model = self._made(target, copies, dtype)
        model.tie_weights()
        return tie(model, target)

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Any:
        theirs = embeddings(target)
        places = {parameter.device for parameter in theirs.values()}
        dtype = theirs["input.weight"].dtype
        if len(places) > 1 or not dtype.is_floating_point:
            raise ValueError(
                f"{self._name} needs the target's embedding and output layer in a float type on one device; they are "
                f"{dtype} on {', '.join(sorted(map(str, places)))}. Load the target that way, or train a drafter "
                "without tie_to_target"
            )
        empty = {name: torch.zeros((), dtype=dtype).expand(theirs[key].shape) for name, key in self.lent.items()}
        model = self._made(target, empty, dtype)
        shared = {key: frozen(parameter) for key, parameter in theirs.items()}  # of tied weights both names get one
        for name, key in self.lent.items():
            set_parameter(model, name, shared[key])
        model.tied_to, model.lent, model.stored_by = self.base, self.lent, TiedDraft
        return model.to(places.pop()).requires_grad_(False).eval()

    def _made(self, target: Any, lent: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        config = copy.deepcopy(self.config)
        config.get_text_config(decoder=True).vocab_size = next(iter(lent.values())).shape[0]
        model = type(target).from_pretrained(None, config=config, state_dict={**self.state, **lent}, dtype=dtype)
        model.generation_config = copy.deepcopy(target.generation_config)
        model.config.name_or_path = self.config._name_or_path  # transformers has replaced it by None
        return model.eval()

    # On disk.

    @classmethod
    def of(cls, model: Any, state_dict: Mapping[str, Tensor] | None = None) -> TiedDraft:
        names = borrowed(model)
        state = model.state_dict() if state_dict is None else state_dict
        own = {name: tensor for name, tensor in state.items() if name not in names}
        return cls(model.tied_to, model.config, own, names)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a Transformers folder and drafter.json."""
        from huggingface_hub import save_torch_state_dict

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_torch_state_dict(self.state, str(folder))
        write_document(folder, TIED, {"base": asdict(self.base), "borrowed": self.lent})

    @classmethod
    def load(cls, path: str, document: Mapping[str, Any], dtype: Any = None, **hub: Any) -> TiedDraft:
        """Reads what `save` wrote.

        Args:
            path: folder or Hub id.
            document: its drafter.json.
            dtype: of its tensors; None or 'auto': as they are stored.
        """
        from transformers import AutoConfig, PreTrainedConfig

        check_config(PreTrainedConfig.get_config_dict(path, **hub)[0], f"{path}/config.json")
        config = AutoConfig.from_pretrained(path, **hub)
        state = read_tensors(path, **hub)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if isinstance(dtype, torch.dtype):
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        at = f"{path}/{DOCUMENT}"
        base, lent = fit(document.get("base"), Lender, f"{at}: base"), document.get("borrowed")
        return cls(base, config, state, fit(lent, dict[str, str], f"{at}: borrowed")).eval()
