"""Self-drafting: a LoRA adapter with which some of the target's own layers draft, on the target's own weights.

On disk it is an ordinary PEFT folder with `drafter.json` beside `adapter_config.json`: PEFT alone would put the
adapter on all layers of a second copy of the base. It knows its layers and its base, and is put on the call's target.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.heads.layers import fingerprint, shared_layers
from csdraft.heads.on_target import OnTarget

__all__ = [
    "DOCUMENT",
    "FULL",
    "SELF_DRAFT",
    "TIED",
    "Base",
    "SelfDraft",
    "adapter_state",
    "is_hub_id",
    "model_name",
    "own_layers",
    "peft_package",
    "read_document",
    "write_document",
]

DOCUMENT, FORMAT = "drafter.json", 1
KINDS = FULL, SELF_DRAFT, TIED = "full", "self_draft", "tied"
"""Kinds of drafters: a model, or an adapter on a base that is loaded with it; an adapter on the target itself; a model
that uses the target's embedding and output layer."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Base:
    """What a self-drafting adapter stands on: layers of a model, and what tells that model from others."""

    layers: tuple[int, ...]
    encoder_layers: tuple[int, ...] | None
    name: str
    revision: str | None
    fingerprint: str
    vocab_size: int


def own_layers(target: Any, layers: Sequence[int], encoder_layers: Sequence[int] | None = None) -> Any:
    """`shared_layers` of the target, with a `Base` as its attribute `self_draft`."""
    network = shared_layers(target, layers, encoder_layers)
    config = target.config
    network.self_draft = Base(
        tuple(layers),
        None if encoder_layers is None else tuple(encoder_layers),
        model_name(target),
        getattr(config, "_commit_hash", None),
        fingerprint(target),
        config.vocab_size,
    )
    network.config._name_or_path = ""
    return network


def model_name(model: Any) -> str:
    """A model's Hub id, or the last part of its folder, or its class."""
    path = str(getattr(model.config, "_name_or_path", ""))
    return path if is_hub_id(path) else os.path.basename(path.rstrip("/")) or type(model).__name__


def is_hub_id(path: str) -> bool:
    """Whether this can be a model of the Hub and is no file or folder here."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) is not None and not os.path.exists(path)


class SelfDraft(OnTarget):
    """A self-drafting adapter without its base; `bind` puts it on a target.

    Args:
        base: what it stands on.
        options: its PEFT config.
        state: its tensors by the names of a PEFT folder.
        source: the folder or Hub id it was loaded from.
    """

    what, use = "self-drafting adapter", "is an adapter for a target's own layers"

    def __init__(self, base: Base, options: Any, state: Mapping[str, Tensor], source: str = ""):
        from transformers import PreTrainedConfig

        super().__init__()
        self.base, self.options = base, options
        config: Any = PreTrainedConfig  # its fields are not typed
        self.config = config(name_or_path=source, vocab_size=base.vocab_size)  # reports and cards ask for these
        self.names = tuple(state)
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in state.values())

    @property
    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names of a PEFT folder."""
        return {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}

    # Binding.

    def check(self, target: Any) -> None:
        """Raises ValueError if `target` is not the model that the adapter was trained on."""
        own = fingerprint(target)
        if own != self.base.fingerprint:
            raise ValueError(
                f"{self._name} drafts with layers {list(self.base.layers)} of {self.base.name}, whose weights have "
                f"fingerprint {self.base.fingerprint}; the target {type(target).__name__} "
                f"{getattr(target.config, '_name_or_path', '')!r} has {own}. Decode with that base, or train an "
                "adapter on this target"
            )

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Any:
        """The target's layers with this adapter: a model of its own modules, over the target's tensors."""
        peft = peft_package()
        network, options, state = self.layers_of(target), copy.deepcopy(self.options), self.state
        options.inference_mode = True
        peft.inject_adapter_in_model(options, network, low_cpu_mem_usage=True)  # draws no random numbers
        result = peft.set_peft_model_state_dict(network, state, low_cpu_mem_usage=True)
        if result.unexpected_keys:
            raise ValueError(f"{self._name} has tensors for modules that its base lacks: {result.unexpected_keys[:4]}")
        for name, parameter in network.named_parameters():  # PEFT has cast them to the base's dtype
            stored = state.get(PREFIX + re.sub(r"\.default(\.|$)", r"\1", name))
            if stored is not None and stored.dtype != parameter.dtype:
                parameter.data = stored.to(parameter.device)
        network.config._name_or_path = self.config._name_or_path
        return network.requires_grad_(False).eval()

    def layers_of(self, target: Any) -> Any:
        """The layers of the target that the adapter stands on, without it; `check` the target first."""
        network = shared_layers(target, self.base.layers, self.base.encoder_layers)
        network.self_draft = self.base
        return network

    # On disk.

    @classmethod
    def of(cls, network: Any) -> SelfDraft:
        """The adapter of `own_layers` that carry one."""
        ((name, options),) = network.peft_config.items()
        return cls(network.self_draft, options, adapter_state(network, name), network.config._name_or_path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a PEFT folder and drafter.json."""
        from safetensors.torch import save_file

        options = copy.deepcopy(self.options)
        options.base_model_name_or_path, options.revision = self.base.name, self.base.revision
        options.inference_mode = True
        options.save_pretrained(str(folder))
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.state.items()}
        save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        described = asdict(self.base)
        layers = {key: described.pop(key) for key in ("layers", "encoder_layers")}
        write_document(folder, SELF_DRAFT, {**layers, "base": described})

    @classmethod
    def load(cls, path: str, document: Mapping[str, Any], **options: Any) -> SelfDraft:
        """What `save` wrote.

        Args:
            path: folder or Hub id.
            document: its drafter.json.
            options: of the Hub: revision, token, ...
        """
        peft = peft_package()
        base = dict(document["base"])
        encoder = document["encoder_layers"]
        base |= {"layers": tuple(document["layers"]), "encoder_layers": None if encoder is None else tuple(encoder)}
        config = peft.PeftConfig.from_pretrained(path, **options)
        return cls(Base(**base), config, peft.load_peft_weights(path, device="cpu", **options), path).eval()


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
    """Writes drafter.json: the kind of drafter, and what it stands on."""
    import csdraft

    document = {"format": FORMAT, "csdraft": csdraft.__version__, "kind": kind, **(described or {})}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    Path(folder, DOCUMENT).write_text(text, encoding="utf-8")


def read_document(path: str, **options: Any) -> dict[str, Any] | None:
    """drafter.json of a folder or Hub id; None if it has none.

    Args:
        options: of the Hub: revision, token, ...
    """
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, DOCUMENT, **options, **quiet)
    if file is None:
        return None
    document = json.loads(Path(file).read_text(encoding="utf-8"))
    if document.get("format") != FORMAT or document.get("kind") not in KINDS:
        raise ValueError(
            f"{DOCUMENT} of {path!r} has format {document.get('format')!r} and kind {document.get('kind')!r}; this "
            f"csdraft reads format {FORMAT} and the kinds {', '.join(KINDS)}: pip install -U csdraft"
        )
    return document


def peft_package() -> Any:
    """The package, or how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install csdraft[train]") from error
    return peft
