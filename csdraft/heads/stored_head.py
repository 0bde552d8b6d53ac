"""Drafting heads in folders: what kinds there are, and which one a folder holds.

A kind of head is a file of this folder whose name ends in `_files`, with one subclass of `StoredHead`: it is found by
being there.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN

import csdraft.heads
from csdraft.heads.head import Head
from csdraft.heads.layers import embeddings, fingerprint
from csdraft.heads.on_target import OnTarget, called
from csdraft.heads.self_draft import HEAD, read_document, write_document
from csdraft.heads.tied import Lender
from csdraft.stored import check_config, fit, read_object, shown

__all__ = [
    "SWITCHING",
    "StoredHead",
    "check_drafted",
    "check_tensors",
    "config_at",
    "head_at",
    "read_layer",
    "read_tensors",
    "recognised",
]

SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary embedding that change with the length of a text."""
OF_WEIGHTS = {"dtype", "torch_dtype", "quantization_config"}
"""Keys of how weights are stored; a head takes the target's dtype."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


class StoredHead(OnTarget):
    """A drafting head without the target whose features, and mostly embedding, it reads; `bind` completes it.

    Args:
        config: of the complete head.
        options: the kind's own.
        state: its tensors by their names in the complete head; those that the target lends are not among them.
        base: the target that it was trained for, if that is known.
    """

    what, use = "drafting head", "reads hidden states of a target"
    lends = {"embed_tokens.weight": "input.weight"}  # noqa: RUF012 - never written to
    """What the target lends where `state` lacks it, see `embeddings`."""

    def __init__(self, config: Any, options: Any, state: Mapping[str, Tensor], base: Lender | None = None):
        super().__init__(config, state)
        self.options, self.base = options, base

    # What a format says.

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.json holds such a head."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> StoredHead:
        """What a folder holds; ValueError for tensors that are missing, unknown or of another shape.

        Args:
            path: folder or Hub id.
            config: its config.json.
            options: of the Hub: revision, token, ...
        """
        raise NotImplementedError

    def network(self, target: Any) -> Head:
        """A complete head for a target, without the stored weights."""
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """What it writes as config.json."""
        raise NotImplementedError

    def described(self) -> dict[str, str]:
        """What it is and what it needs, in a few words each, by topic."""
        raise NotImplementedError

    @staticmethod
    def refusals(config: Mapping[str, Any]) -> dict[str, str | None]:
        """By serving engine, why it would not load a folder with this config.json, or load it as another head."""
        raise NotImplementedError

    @property
    def target_width(self) -> int:
        """Width of the target's hidden states."""
        return self.config.hidden_size

    # Binding.

    def check_shape(self, target: Any) -> None:
        """Raises ValueError if no head of these sizes can be of this target."""
        text = target.config.get_text_config(decoder=True)
        for key, wanted in {"hidden_size": self.target_width, "vocab_size": self.config.vocab_size}.items():
            if (found := getattr(text, key)) != wanted:
                raise ValueError(
                    f"{self._name} was trained for a target with {key}={wanted}, {called(target)} has {found}; "
                    "decode with the head's own target"
                )

    def check(self, target: Any) -> None:
        self.check_shape(target)
        if self.base is not None and (found := fingerprint(target)) != self.base.fingerprint:
            raise ValueError(
                f"{self._name} was trained on {self.base.name}, whose weights have fingerprint "
                f"{self.base.fingerprint}; the target {called(target)} has {found}. Decode with that target, or "
                "train a head for this one"
            )

    def open(self, target: Any, dtype: torch.dtype) -> Head:
        """A complete head in this dtype, to be trained on."""
        self.check(target)
        made = self._made(target, dtype)
        for name in made.lent:
            own = made.get_parameter(name)
            _set(made, name, nn.Parameter(own.to(dtype, copy=True), requires_grad=False))
        return made

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Head:
        dtype = embeddings(target)["input.weight"].dtype
        made = self._made(target, dtype if dtype.is_floating_point else torch.float32)
        return made.requires_grad_(False).eval()

    def _made(self, target: Any, dtype: torch.dtype) -> Any:
        """The head on the target's device, with the target's own tensors where it has none."""
        theirs = embeddings(target)
        with torch.device("meta"):
            made: Any = self.network(target)
        device = theirs["input.weight"].device
        made.to_empty(device=device).to(dtype)
        made.make_buffers()
        made.to(device)
        made.d2t.zero_()
        own = dict(made.named_parameters()) | dict(made.named_buffers())
        for name, tensor in self.state.items():
            own[name].data.copy_(tensor)
        made.lent = {name: source for name, source in self.lends.items() if name in own and name not in self.names}
        for name, source in made.lent.items():
            lent = theirs.get(source, theirs["input.weight"])  # an output layer may be the embedding
            _set(made, name, nn.Parameter(lent.detach(), requires_grad=False))
        made.base, made.stored_by = self.base, type(self)
        made.config._name_or_path = self.config._name_or_path
        return made

    # On disk.

    @classmethod
    def of(cls, head: Any, state_dict: Mapping[str, Tensor] | None = None) -> Self:
        state = dict(head.state_dict() if state_dict is None else state_dict)
        state = {name: tensor for name, tensor in state.items() if name not in head.lent}
        if len(head.d2t) == head.config.vocab_size:
            del state["d2t"]
        return cls(head.config, head.options, state, head.base)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what `load` reads."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.state.items()}
        if "d2t" in tensors:
            tensors["t2d"] = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            tensors["t2d"][tensors["d2t"] + torch.arange(len(tensors["d2t"]))] = True
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(self.document(), indent=2, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        write_document(folder, HEAD, {"base": asdict(self.base)} if self.base is not None else {})

    @staticmethod
    def base_of(path: str, **options: Any) -> Lender | None:
        """The target that a folder's drafter.json names, if it has one.

        Args:
            options: of the Hub: revision, token, ...
        """
        noted = (read_document(path, **options) or {}).get("base")
        return None if noted is None else fit(noted, Lender, f"{path}/drafter.json: base")


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, parameter)


@cache
def kinds() -> tuple[type[StoredHead], ...]:
    """The kinds of heads that can be read."""
    names = sorted(module.name for module in pkgutil.iter_modules(csdraft.heads.__path__))
    modules = [importlib.import_module(f"csdraft.heads.{name}") for name in names if name.endswith("_files")]
    made = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return tuple(kind for kind in made if issubclass(kind, StoredHead) and kind is not StoredHead)


def head_at(path: str, **options: Any) -> StoredHead | None:
    """The drafting head in a folder or at a Hub id; None if that holds something else.

    Args:
        options: of the Hub: revision, token, ...
    """
    config = config_at(path, **options)
    if config is None or (kind := recognised(config)) is None:
        return None
    check_config(config, f"{path}/config.json")
    return kind.load(path, config, **options)


def recognised(config: Mapping[str, Any]) -> type[StoredHead] | None:
    """The kind of head that a folder with this config.json holds; None if it holds something else."""
    return next((kind for kind in kinds() if kind.recognises(config)), None)


def config_at(path: str, **options: Any) -> dict[str, Any] | None:
    """The config.json of a folder or Hub id; None if it has none."""
    from transformers.utils import cached_file

    file = cached_file(path, "config.json", **options, **QUIET)
    return None if file is None else read_object(file)


def read_tensors(path: str, **options: Any) -> dict[str, Tensor]:
    """The tensors of a folder or Hub id that keeps them in one file.

    Args:
        options: of the Hub: revision, token, ...

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    found = ((name, cached_file(path, name, **options, **QUIET)) for name in WEIGHTS)
    name, file = next(((name, file) for name, file in found if file is not None), (None, None))
    if file is None:
        raise ValueError(f"{path!r} has a config.json and none of {', '.join(WEIGHTS)}; get its weights too")
    try:
        of_torch = name != WEIGHTS[0]
        state = torch.load(file, map_location="cpu", weights_only=True) if of_torch else load_file(file)
    except UnpicklingError as error:  # whose message advises to trust the file
        raise ValueError(f"{file} holds other things than tensors, or is cut short; get {WEIGHTS[0]}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); it may be cut short: get it again") from error
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds other things than tensors by name; get {WEIGHTS[0]}")
    return state


def check_tensors(path: str, state: Mapping[str, Tensor], module: nn.Module, optional: set[str]) -> None:
    """Raises ValueError unless a folder's tensors are just those of a module.

    Args:
        optional: names that may be missing.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys() - optional):
        raise ValueError(f"{path!r} lacks {', '.join(missing[:4])}: random numbers in their place would be of no use")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"{path!r} has tensors that csdraft does not know for such a head: {', '.join(unknown[:4])}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path!r}: {name} has shape {tuple(tensor.shape)}, its config.json asks for {tuple(own[name].shape)}"
            )


def check_drafted(state: Mapping[str, Tensor], vocab: int, path: str) -> None:
    """Raises ValueError if `d2t` leads out of the target's vocabulary, or twice to one token."""
    if "d2t" not in state:
        return
    ids = state["d2t"].long() + torch.arange(len(state["d2t"]))
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < len(ids):
        raise ValueError(
            f"{path!r}: d2t must hold offsets (target token - draft token) that lead to different tokens below "
            f"{vocab}; they lead to {int(ids.min())} to {int(ids.max())}, {len(ids.unique())} of {len(ids)} different"
        )


def read_layer(document: Mapping[str, Any], at: str) -> LlamaConfig:
    """The config of a head's layer: what a `LlamaConfig` knows of a config.json.

    Args:
        at: the file, which messages name.
    """
    if document.get("model_type", "llama") != "llama":
        raise ValueError(f"{at}: model_type={document['model_type']!r}; csdraft reads heads with a llama layer")
    if quantised := document.get("quantization_config"):
        raise ValueError(f"{at}: quantization_config={shown(quantised)}; csdraft reads heads that are not quantised")
    known = {key: value for key, value in document.items() if key not in OF_WEIGHTS}
    try:
        config: Any = LlamaConfig.from_dict({**known, "num_hidden_layers": 1, "model_type": "llama"})
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{at} is no config of a Llama layer: {' '.join(str(error).split())}") from error
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{at}: hidden_act={shown(config.hidden_act)} is unknown; get the head's own config.json")
    if (kind := config.rope_parameters.get("rope_type", "default")) in SWITCHING:
        raise ValueError(f"{at}: rope_type={kind!r} changes with the length of a text, which csdraft's heads cannot")
    if document.get("logit_scale", 1.0) != 1.0:
        raise ValueError(f"{at}: logit_scale={document['logit_scale']!r}; csdraft reads heads without one")
    return config
