"""Self-drafting: a LoRA adapter with which some of the target's own layers draft, on the target's own weights.

On disk it is an ordinary PEFT folder with `drafter.json` beside `adapter_config.json`. PEFT alone would put the
adapter on all layers of a second copy of the base; `drafter.json` says which layers of which model it belongs on.
Functions that read a `path`, a folder or Hub id, take options of the Hub as `hub`: revision, token, ...
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from csdraft.decoding.names import name_of
from csdraft.heads.folder import file_at, write_tensors
from csdraft.heads.layers import fingerprint, shared_layers
from csdraft.heads.on_target import OnTarget, name_only
from csdraft.stored import fit, is_hub_id, naming, read_object, shown
from csdraft.version import __version__

__all__ = [
    "DOCUMENT", "FULL", "HEAD", "KANGAROO", "MTP", "SELF_DRAFT", "TIED", "Base", "Lender", "SelfDraft",
    "adapter_state", "model_name", "own_layers", "peft_package", "read_document", "write_document",
]  # fmt: skip

DOCUMENT, FORMAT = "drafter.json", 1
KINDS = FULL, SELF_DRAFT, TIED, HEAD, KANGAROO, MTP = "full", "self_draft", "tied", "head", "kangaroo", "mtp"
"""Kinds of drafters: a model, or an adapter on a base that is loaded with it; an adapter on the target itself; a model
that uses the target's embedding and output layer; a head that reads the target's hidden states; an adapter after the
target's first layers; the target's own next-token module."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lender:
    """The model that a drafter was trained on."""

    name: str
    revision: str | None
    fingerprint: str
    vocab_size: int

    @classmethod
    def of(cls, model: Any, fingerprint: str, **more: Any) -> Self:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        return cls(model_name(model), getattr(model.config, "_commit_hash", None), fingerprint, vocab, **more)


@dataclass(frozen=True)
class Base(Lender):
    """The model that a self-drafting adapter was trained on, and the layers of it that draft."""

    layers: tuple[int, ...]
    encoder_layers: tuple[int, ...] | None


def own_layers(target: Any, layers: Sequence[int], encoder_layers: Sequence[int] | None = None) -> Any:
    """`shared_layers` of the target, with a `Base` as its attribute `self_draft`."""
    network = shared_layers(target, layers, encoder_layers)
    kept = {"layers": tuple(layers), "encoder_layers": None if encoder_layers is None else tuple(encoder_layers)}
    network.stored_by, network.self_draft = SelfDraft, Base.of(target, fingerprint(target), **kept)
    network.config._name_or_path = ""
    return network


def model_name(model: Any) -> str:
    """A model's Hub id, or else the last part of its folder, since a path holds on this machine only, or its class."""
    path = str(getattr(model.config, "_name_or_path", ""))
    return path if is_hub_id(path) else name_of(model)


class SelfDraft(OnTarget):
    """A self-drafting adapter without its base; `bind` puts it on a target.

    Args:
        base: the model and layers that it was trained on.
        options: its PEFT config.
        state: its tensors by the names of a PEFT folder.
        source: the folder or Hub id it was loaded from.
    """

    what, use = "self-drafting adapter", "is an adapter for a target's own layers"

    def __init__(self, base: Base, options: Any, state: Mapping[str, Tensor], source: str = ""):
        super().__init__(name_only(source, vocab_size=base.vocab_size), state)
        self.base, self.options = base, options

    # Binding.

    @property
    def _trained_on(self) -> str:  # type: ignore[override]
        return f"drafts with layers {list(self.base.layers)} of"

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Any:
        """The target's layers with this adapter: new modules over the target's tensors."""
        network, state = self.layers_of(target), self.state
        put_adapter(network, self.options, state, self._name)
        for name, parameter in network.named_parameters():  # PEFT has cast them to the base's dtype
            stored = state.get(PREFIX + re.sub(r"\.default(\.|$)", r"\1", name))
            if stored is not None and stored.dtype != parameter.dtype:
                parameter.data = stored.to(parameter.device)
        network.config._name_or_path = self.config._name_or_path
        return network.requires_grad_(False).eval()

    def layers_of(self, target: Any) -> Any:
        """The target's layers that it belongs on, without the adapter; `check` the target first."""
        with naming(self._name):
            network = shared_layers(target, self.base.layers, self.base.encoder_layers)
        network.stored_by, network.self_draft = SelfDraft, self.base
        return network

    def open(self, target: Any, dtype: torch.dtype) -> Any:
        """See `OnTarget.open`; the adapter keeps the dtype that PEFT gives it on its base."""
        self.check(target)
        options = copy.deepcopy(self.options)
        options.inference_mode, options.base_model_name_or_path = False, None
        network = peft_package().get_peft_model(self.layers_of(target), options)
        peft_package().set_peft_model_state_dict(network, self.state)
        return network

    # On disk.

    @classmethod
    def of(cls, model: Any, state_dict: Mapping[str, Tensor] | None = None) -> SelfDraft:
        """It does not read `state_dict`: no engine splits an adapter on the target's layers."""
        ((name, options),) = model.peft_config.items()
        return cls(model.self_draft, options, adapter_state(model, name), model.config._name_or_path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a PEFT folder and drafter.json."""
        options = copy.deepcopy(self.options)
        options.base_model_name_or_path, options.revision = self.base.name, self.base.revision
        options.inference_mode = True
        options.save_pretrained(str(folder))
        write_tensors(Path(folder, "adapter_model.safetensors"), self.state)
        described = asdict(self.base)
        layers = {key: described.pop(key) for key in ("layers", "encoder_layers")}
        write_document(folder, SELF_DRAFT, {**layers, "base": described})

    @classmethod
    def load(cls, path: str, document: Mapping[str, Any], **hub: Any) -> SelfDraft:
        """Reads what `save` wrote."""
        return cls(_base(document, DOCUMENT), *read_adapter(path, **hub), path).eval()


def read_adapter(path: str, **hub: Any) -> tuple[Any, dict[str, Tensor]]:
    """The config and the tensors of a PEFT folder.

    Raises:
        ValueError: one of its files is broken.
    """
    from safetensors import SafetensorError

    peft, where = peft_package(), f"adapter_config.json of {path!r}"
    try:
        config = peft.PeftConfig.from_pretrained(path, **hub)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # PEFT does not check the file's values
        raise ValueError(f"{where} is not an adapter's config ({type(error).__name__}: {error})") from error
    try:
        return config, peft.load_peft_weights(path, device="cpu", **hub)
    except SafetensorError as error:
        file = Path(path, "adapter_model.safetensors")
        raise ValueError(f"{file} cannot be read ({error}); it may be cut short: get it again") from error


def put_adapter(network: Any, options: Any, state: dict[str, Tensor], name: str) -> None:
    """Puts an adapter on a model, in place; it draws no random numbers.

    Args:
        options: its PEFT config.
        state: its tensors by the names of a PEFT folder.
        name: its name in messages.

    Raises:
        ValueError: tensors are missing or unknown, or do not fit this model.
    """
    peft, options = peft_package(), copy.deepcopy(options)
    options.inference_mode = True
    try:
        peft.inject_adapter_in_model(options, network, low_cpu_mem_usage=True)
        own = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}  # as PEFT looks for whole modules
        result = peft.set_peft_model_state_dict(network, own, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not fit its base: {error}") from error
    if result.unexpected_keys:
        raise ValueError(f"{name} has tensors for modules that its base lacks: {result.unexpected_keys[:4]}")
    if missing := [key for key, parameter in network.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{name} lacks {len(missing)} of its weights, such as {', '.join(missing[:4])}: save all")


def adapter_state(network: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors, by the names of a PEFT folder.

    Args:
        network: the model inside a PeftModel.
        name: the adapter's.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    return {PREFIX + key: value.detach().clone() for key, value in state.items()}


def write_document(
    folder: str | os.PathLike[str], kind: str = "full", described: Mapping[str, Any] | None = None
) -> None:
    """Writes drafter.json: the kind of drafter, and the target that it needs."""
    document = {"format": FORMAT, "csdraft": __version__, "kind": kind, **(described or {})}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    Path(folder, DOCUMENT).write_text(text, encoding="utf-8")


def read_document(path: str, **hub: Any) -> dict[str, Any] | None:
    """drafter.json of a folder or Hub id; None if it has none."""
    file = file_at(path, DOCUMENT, **hub)
    if file is None:
        return None
    document = read_object(file)
    found, kind = document.get("format"), document.get("kind")
    if found is True or found != FORMAT or kind not in KINDS:
        raise ValueError(
            f"{DOCUMENT} of {path!r} has format {shown(found)} and kind {shown(kind)}; this csdraft reads format "
            f"{FORMAT} and the kinds {', '.join(KINDS)}: pip install -U csdraft"
        )
    if kind == SELF_DRAFT:
        _base(document, file)
    return document


def _base(document: Mapping[str, Any], file: str) -> Base:
    """The base in a self-drafting adapter's drafter.json; a ValueError names file and key."""
    base = fit(document.get("base"), dict[str, Any], f"{file}: base")
    layers = fit(document.get("layers"), tuple[int, ...], f"{file}: layers")
    encoder = fit(document.get("encoder_layers"), tuple[int, ...] | None, f"{file}: encoder_layers")
    return fit({**base, "layers": layers, "encoder_layers": encoder}, Base, f"{file}: base")


def peft_package() -> Any:
    """The package peft; ImportError says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install csdraft[train]") from error
    return peft
