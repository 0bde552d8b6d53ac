"""Saves a cascade: cascade.json, models, tables, provenance, model card, shim for `custom_generate`; uploads it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import transformers
from huggingface_hub.utils import HFValidationError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csdraft import spec
from csdraft.card import SHIM, SIGNATURE, model_card
from csdraft.decoding.names import name_of
from csdraft.heads.folder import write_tensors
from csdraft.heads.on_target import stored_form
from csdraft.heads.self_draft import adapter_state, model_name
from csdraft.models import base_model
from csdraft.saved_costs import save_costs
from csdraft.stored import is_hub_id, read_object
from csdraft.version import __version__

if TYPE_CHECKING:
    from csdraft.cascade import CascadeDrafter

__all__ = [
    "DOCUMENT", "FORMAT", "Target", "check_free", "command", "fingerprint", "run_record", "save", "upload",
    "vocab_size", "without_folders",
]  # fmt: skip

DOCUMENT, FORMAT = "cascade.json", 1
OWN_FOLDERS = ("models", "tables", "tokenizers", "custom_generate")
ABSOLUTE = re.compile(r"(?<![^\s=\[{(,'\"])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s,\]})'\"]+")
SECRET = re.compile(r"(token|secret|password|api[-_]?key|credentials?)(=|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What is saved about a cascade's target. Its weights are never saved."""

    name: str
    revision: str | None
    vocab_size: int
    model: Callable[[], nn.Module | None] = field(compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        model = base_model(model)
        return cls(model_name(model), _own_revision(model), vocab_size(model), weakref.ref(model))

    def __reduce__(self) -> tuple[type, tuple]:
        return Target, (self.name, self.revision, self.vocab_size, _gone)  # a process cannot refer to another's model

    def __deepcopy__(self, memo: dict) -> Target:
        return self


def _gone() -> None:
    """Stands for the model of a target that was pickled."""


def vocab_size(model: nn.Module) -> int:
    """The size of the model's vocabulary, padding included."""
    return model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of a tokenizer's vocabulary: equal if each id means the same token."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(json.dumps(entries).encode()).hexdigest()


# Writing.


def save(
    cascade: CascadeDrafter,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Target | None,
    copy_models: bool,
    repo_id: str | None = None,
) -> None:
    """Writes a cascade to a folder. A cascade that was saved there before is replaced when the new one is complete.

    Args:
        cascade, path, tokenizer, target, copy_models: see `CascadeDrafter.save_pretrained`.
        repo_id: where the folder will be uploaded, for its model card.
    """
    check_free(path)
    models: dict[str, nn.Module] = {}
    tables: dict[str, Any] = {}
    places: dict[str, Any] = {}
    write = partial(spec.to_json, names=spec.Names(models, tables, places))
    document: dict[str, Any] = {"format": FORMAT, "csdraft": __version__, "target": {}, "models": {}}
    document["drafters"] = [write(drafter) for drafter in cascade.drafters]
    document |= {"k_matrix": cascade.k_matrix, "lenience": cascade.lenience}
    document |= {"verifier": write(cascade.verifier), "schedule": write(cascade.schedule)}
    if options := cascade.options.to_json():
        document["options"] = options
    sizes = [target.vocab_size] if target else map(vocab_size, models.values())
    document["target"] = {
        "name": target.name if target else None,
        "revision": target.revision if target else None,
        "vocab_size": max(sizes, default=None),
        "tokenizer": fingerprint(tokenizer) if tokenizer is not None else None,
    }
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as name:
        scratch = Path(name)
        document["models"] = {
            name: _write_model(model, f"models/{name}", scratch, target, copy_models) for name, model in models.items()
        }
        for name, table in tables.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            table.save(scratch / name)
        save_costs(cascade.memory, scratch)
        for name, place in places.items():
            _write_tokenizer(place, scratch / name)
        (scratch / "custom_generate").mkdir()
        (scratch / "custom_generate" / "generate.py").write_text(SHIM)
        provenance = _provenance(models, cascade)
        _write_json(scratch / "provenance.json", provenance)
        card = model_card(document, provenance, repo_id or path.name, cascade.verifier.lossless)  # type: ignore[union-attr]
        (scratch / "README.md").write_text(card, encoding="utf-8")
        _write_json(scratch / DOCUMENT, document)
        _move_in(scratch, path)


def check_free(path: Path) -> None:
    """Raises ValueError if saving a cascade at `path` would replace what is no cascade."""
    clash = [name for name in OWN_FOLDERS if (path / name).exists()]
    if path.is_file() or (clash and not (path / DOCUMENT).exists()):
        found = "a file" if path.is_file() else f"not a saved cascade, but has {clash}"
        raise ValueError(f"{str(path)!r} is {found}, which saving would replace; give a new folder")


def _write_model(model: nn.Module, folder: str, scratch: Path, target: Target | None, copy_models: bool) -> dict:
    """Saves a model; returns its entry in cascade.json: a folder, a Hub id with its revision, or the target itself."""
    if target is not None and target.model() is model:
        return {"target": True}
    stored: Any = stored_form(model)
    if stored is not None:
        stored.save(scratch / folder)
        return {"folder": folder}
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model, so its weights cannot be saved")
    adapters = getattr(model, "peft_config", None)
    source = model_name(model)
    revision = None if copy_models or adapters else _own_revision(model) or _cached_revision(source)
    if revision is not None:
        return {"id": source, "revision": revision}
    if adapters:
        _write_adapter(model, adapters, scratch / folder)
    else:
        model.save_pretrained(scratch / folder)
    return {"folder": folder}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a copy of a tokenizer, which may be given by its path."""
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


def _own_revision(model: nn.Module) -> str | None:
    """The Hub commit that a model was loaded from."""
    return getattr(model.config, "_commit_hash", None) if is_hub_id(model_name(model)) else None


def _cached_revision(repo: str) -> str | None:
    """The commit of a repository's main branch in this machine's Hub cache; None if it is not cached."""
    file = huggingface_hub.try_to_load_from_cache(repo, "config.json") if is_hub_id(repo) else None
    return Path(file).parent.name if isinstance(file, str) else None


def _write_adapter(model: nn.Module, adapters: dict[str, Any], folder: Path) -> None:
    """Saves an adapter as a PEFT folder, which names its base model but does not contain it."""
    if len(adapters) != 1:
        raise ValueError(
            f"drafter {name_of(model)} has adapters {sorted(adapters)}, but only one per model can be saved: delete "
            "the others, or merge them (merge_and_unload)"
        )
    ((name, options),) = adapters.items()
    options = copy.deepcopy(options)
    base = options.base_model_name_or_path or getattr(model.config, "_name_or_path", "")
    if not base:
        raise ValueError(
            f"the base of adapter {name!r} has no path or Hub id, and a PEFT folder does not contain it: save the "
            "base and load it from there, or merge the adapter (merge_and_unload)"
        )
    if os.path.exists(base):
        warnings.warn(
            f"adapter {name!r} needs its base {base!r}, which is not saved with the cascade: it can only be loaded "
            "where that path exists, with CascadeDrafter.from_pretrained(..., local_bases=True). Merge the adapter "
            "(merge_and_unload) to save both.",
            UserWarning,
            stacklevel=5,
        )
    options.base_model_name_or_path, options.inference_mode = base, True
    options.save_pretrained(folder)
    write_tensors(folder / "adapter_model.safetensors", adapter_state(model, name))


def _provenance(models: dict[str, nn.Module], cascade: CascadeDrafter) -> dict[str, Any]:
    """How the cascade and its models were made, and the figures of its calls, without texts and paths."""
    report = cascade.report
    described = {
        name: {
            "source": model_name(model),
            "revision": _own_revision(model),
            "trained": _trained(model),
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), None),
        }
        for name, model in models.items()
    }
    measured = None
    if report is not None and report.rounds:
        figures = ("calls", "emitted", "rounds", "target_calls", "block_efficiency", "acceptance_rate")
        measured = {figure: getattr(report, figure) for figure in figures}
    return {**run_record(("torch", "transformers")), "models": described, "measured": measured}


def run_record(packages: Iterable[str]) -> dict[str, Any]:
    """The first keys of every provenance.json: time, command, and versions of csdraft, Python and these packages."""
    versions = {"csdraft": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": created, "command": command(), "versions": versions}


def _trained(model: nn.Module) -> dict[str, Any] | None:
    """How a drafter was trained, from the provenance.json beside its weights: command, target, data and steps."""
    folder = str(getattr(model.config, "_name_or_path", ""))
    if not folder or not (path := Path(folder, "provenance.json")).is_file():
        return None
    origin = read_object(path)
    return {key: origin.get(key) for key in ("command", "target", "data", "steps")}


def command() -> str:
    """The running program and its arguments, without possible secrets and without folders of this machine."""
    kept, words = [Path(sys.argv[0]).name], iter(sys.argv[1:])
    for word in words:
        if not SECRET.search(word):
            kept.append(re.sub(r"\bhf_\w+", "hf_...", without_folders(word)))
        elif "=" not in word and word.startswith("-"):
            next(words, None)  # the secret itself
    return " ".join(kept)


def without_folders(text: str) -> str:
    """The text with each path that starts with /, ~ or . cut to its last part."""
    return ABSOLUTE.sub(lambda path: re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], text)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _move_in(scratch: Path, path: Path) -> None:
    """Replaces an earlier save; cascade.json comes last. A model card that was edited by hand is kept."""
    card = path / "README.md"
    if card.exists() and SIGNATURE.encode() not in card.read_bytes():
        (scratch / card.name).unlink()
    for name in OWN_FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for entry in sorted(scratch.iterdir(), key=lambda entry: entry.name == DOCUMENT):
        os.replace(entry, path / entry.name)


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with csdraft",
) -> str:
    """Commits every file of `folder` to a repository, which is created if needed.

    Args:
        repo_id: "user/name".
        token: a token with write access; None uses the one that `hf auth login` stored.
        private: whether a new repository is private; None uses the account's default.
        revision: branch to commit to, created if needed; None is "main".

    Returns:
        The commit's address.

    Raises:
        ValueError: `repo_id` is not a valid Hub id.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id, give 'user/name': {error}") from error
    if revision is not None and not revision.startswith("refs/"):  # the branch of a pull request exists
        api.create_branch(repo, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message, repo_type="model"
    )
    return str(done.commit_url)
