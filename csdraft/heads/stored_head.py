"""Drafting heads in folders: what kinds there are, and which one a folder holds.

A kind of head is a file of this folder whose name ends in `_files`, with one subclass of `StoredHead`: it is found by
being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import csdraft.heads
from csdraft.heads.on_target import OnTarget
from csdraft.stored import check_config, read_object

__all__ = ["StoredHead", "check_tensors", "config_at", "head_at", "read_tensors", "recognised"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


class StoredHead(OnTarget):
    """A drafting head without the target whose features, and mostly embedding, it reads; `bind` completes it."""

    what, use = "drafting head", "reads hidden states of a target"

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

    def open(self, target: Any, dtype: torch.dtype) -> nn.Module:
        """A complete head in this dtype, to be trained on."""
        raise NotImplementedError

    @classmethod
    def of(cls, head: Any, state_dict: Mapping[str, Tensor] | None = None) -> StoredHead:
        """What is stored of a complete head.

        Args:
            state_dict: its weights, gathered, if its own parameters are not whole.
        """
        raise NotImplementedError

    @property
    def state(self) -> dict[str, Tensor]:
        """Its tensors by their names in the complete head."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Writes what `load` reads."""
        raise NotImplementedError

    def described(self) -> dict[str, str]:
        """What it is and what it needs, in a few words each, by topic."""
        raise NotImplementedError

    @staticmethod
    def refusals(config: Mapping[str, Any]) -> dict[str, str | None]:
        """By serving engine, why it would not load a folder with this config.json, or load it as another head."""
        raise NotImplementedError


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
