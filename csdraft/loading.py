"""Loads a saved cascade: cascade.json, and the models, tables and tokenizers in its folder.

The files may come from strangers. Any fault raises a ValueError that names the file and the key. Only the folder and
models of the Hub are opened, and none of their code is run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from csdraft import spec
from csdraft.decoding.names import name_of
from csdraft.decoding.states import home
from csdraft.heads.on_target import OnTarget
from csdraft.hub import DOCUMENT, FORMAT, fingerprint, vocab_size
from csdraft.models import MOST_VOCABULARY_PADDING, base_model, load_model
from csdraft.options import Options
from csdraft.stored import fit, is_hub_id, naming, path_inside, read_object, shown
from csdraft.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["find_cascade", "load", "read"]

MOST_DRAFTERS = 64
"""The most drafters of a cascade."""


@dataclass(frozen=True)
class SavedTarget:
    """What cascade.json says about the model that the cascade was saved for."""

    name: str | None = None
    revision: str | None = None
    vocab_size: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """Where a model is: in a folder of the cascade, on the Hub (`id`), or it is the target. Exactly one is given."""

    folder: str | None = None
    id: str | None = None
    revision: str | None = None
    target: bool | None = None


@dataclass(frozen=True)
class Document:
    """The content of cascade.json."""

    format: int
    csdraft: str
    target: SavedTarget
    models: dict[str, Any]
    drafters: list[Any]
    k_matrix: Any
    lenience: float | tuple[float, ...]
    verifier: Any
    schedule: Any
    options: dict[str, Any] = field(default_factory=dict)


def find_cascade(path: str, **options: Any) -> Path | None:
    """The local folder of a saved cascade, downloaded if `path` is a Hub id; None if `path` has no cascade."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    if not is_hub_id(path):
        return Path(path) if Path(path, DOCUMENT).is_file() else None
    try:
        hf_hub_download(path, DOCUMENT, **options)
    except EntryNotFoundError:
        return None
    return Path(snapshot_download(path, **options))


def load(
    folder: Path,
    target: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    local_bases: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of the CascadeDrafter that `folder` holds.

    Args:
        local_bases: whether the bases of adapters may be paths of this machine.
        options: of transformers' `from_pretrained`. A revision is the folder's, and is not used for the models.
    """
    document = read(folder)
    check_target(document.target, target, tokenizer)
    options.pop("revision", None)
    try:
        return _Reader(folder, target, {**options, "local_base": local_bases}).arguments(document)
    except RecursionError as error:
        raise ValueError(f"{DOCUMENT}: its drafters are nested too deeply") from error


def read(folder: Path) -> Document:
    """The content of cascade.json, after checks of its format, its keys and their types."""
    path_inside(folder, DOCUMENT)
    document = read_object(folder / DOCUMENT, DOCUMENT)
    found = document.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{DOCUMENT} has format {shown(found)}, expected {FORMAT}; did csdraft write it?")
    if found > FORMAT:
        raise ValueError(
            f"{DOCUMENT} has format {shown(found)}, written by csdraft {str(document.get('csdraft'))[:40]}; csdraft "
            f"{__version__} reads formats up to {FORMAT}: pip install -U csdraft"
        )
    made = fit(document, Document, DOCUMENT)
    if len(made.drafters) > MOST_DRAFTERS:
        raise ValueError(f"{DOCUMENT}: drafters has {len(made.drafters)} entries; at most {MOST_DRAFTERS} fit")
    return made


def check_target(saved: SavedTarget, target: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError if a cascade was saved for another vocabulary."""
    name, wanted = saved.name or "its target", saved.vocab_size
    compared = tokenizer is not None and saved.tokenizer is not None
    if compared and (own := fingerprint(tokenizer)) != saved.tokenizer:  # type: ignore[arg-type]
        raise ValueError(
            f"{DOCUMENT}: target.tokenizer: the tokenizer has fingerprint {own}, the cascade was saved for {name} "
            f"with {saved.tokenizer}; drafted ids would mean other tokens: use a target with the same tokenizer, "
            "or train drafters with this one"
        )
    # Models with the same tokenizer may have different padding. If tokenizers are unknown, sizes must be equal.
    slack = MOST_VOCABULARY_PADDING if compared else 0
    if target is not None and wanted is not None and abs(vocab_size(target) - wanted) > slack:
        raise ValueError(
            f"{DOCUMENT}: target.vocab_size: target {name_of(target)} has {vocab_size(target)} tokens, the cascade "
            f"was saved for {name} with {wanted}; use a target with the same vocabulary"
            + ("" if compared else ", or, if only padding differs, save and load with tokenizer=")
        )


@dataclass(frozen=True)
class _Reader:
    """Makes the parts of a cascade; the options are those of `load_model`."""

    folder: Path
    target: nn.Module | None
    options: dict[str, Any]

    def arguments(self, document: Document) -> dict[str, Any]:
        models = {name: self._model(name, value) for name, value in document.models.items()}
        tables = {name: str(path) for name, path in self._inside("tables", "*.safetensors").items()}
        places = {name: str(path) for name, path in self._inside("tokenizers", "*").items()}
        names = spec.Names(models, tables, places)

        def made(family: str, value: Any, key: str) -> Any:
            return spec.from_json(family, value, names, f"{DOCUMENT}: {key}")

        return {
            "drafters": [made("drafters", one, f"drafters[{i}]") for i, one in enumerate(document.drafters)],
            "k_matrix": document.k_matrix,
            "lenience": document.lenience,
            "verifier": made("verifiers", document.verifier, "verifier"),
            "schedule": made("schedules", document.schedule, "schedule"),
            "options": Options.from_json(document.options, f"{DOCUMENT}: options"),
        }

    def _inside(self, name: str, pattern: str) -> dict[str, Path]:
        """The files in a subfolder, by the names that cascade.json uses for them."""
        found = sorted(self.folder.glob(f"{name}/{pattern}"))
        with naming(DOCUMENT):
            return {f"{name}/{path.name}": _closed(path_inside(self.folder, f"{name}/{path.name}")) for path in found}

    def _model(self, name: str, value: Any) -> nn.Module:
        """A model of cascade.json, on the target's device unless there is a device_map."""
        at, target = f"{DOCUMENT}: models.{name}", self.target
        entry = fit(value, ModelEntry, at) if isinstance(value, dict) else ModelEntry()
        given = [key for key in ("folder", "id", "target") if getattr(entry, key) is not None]
        if len(given) != 1 or entry.target is False:
            raise ValueError(f"{at} is {shown(value)}; give a folder, a Hub id (and revision), or target: true")
        if entry.target:
            if target is None:
                raise ValueError(f"{at} is the target itself: pass target=, the model to decode with")
            return target
        model = self._loaded(entry, f"{at}.{given[0]}")
        if isinstance(model, OnTarget) and target is not None:
            with naming(at):
                model.check(base_model(target))
        if target is not None and "device_map" not in self.options:
            model = model.to(home(target)[0])
        return model

    def _loaded(self, entry: ModelEntry, at: str) -> nn.Module:
        options, path = self.options, self.folder
        with naming(at):
            if entry.id is not None and not is_hub_id(entry.id):
                raise ValueError(f"{shown(entry.id)} is not a Hub id; for a folder of the cascade use the key folder")
            if entry.folder is not None:
                path = _closed(path_inside(self.folder, entry.folder))
                if not path.is_dir():
                    raise ValueError(f"there is no folder {shown(entry.folder)}")
        try:
            if entry.id is not None:
                return load_model(entry.id, **options, revision=entry.revision)
            return load_model(str(path), **options)
        except (ImportError, MemoryError, torch.OutOfMemoryError):  # these are not faults of the file
            raise
        except Exception as error:  # for a wrong config.json, transformers raises errors of many types
            raise ValueError(f"{at}: {error}") from error


def _closed(path: Path) -> Path:
    """The same folder, or file. Raises ValueError if a file in it names others by a path, which could be anywhere."""
    for index in sorted(path.glob("*.index.json")):
        for name in fit(read_object(index).get("weight_map"), dict[str, str], f"{index}: weight_map").values():
            if os.path.basename(name) != name:
                raise ValueError(f"{index} names {shown(name)}; name a file in the same folder, without a path")
    config = path / "tokenizer_config.json"
    for key, value in read_object(config).items() if config.is_file() else ():
        if key.endswith(("_file", "_files")) and value is not None:
            raise ValueError(f"{config}: {key}={shown(value)}; remove the key: a tokenizer's files have usual names")
    return path
