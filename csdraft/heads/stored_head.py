"""Drafting heads in folders: what kinds there are, and which one a folder holds.

A kind of head is a file of this folder whose name ends in `_files`, with one subclass of `StoredHead`: it is found by
being there.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import csdraft.heads
from csdraft.heads.engines import ENGINES, ServedTarget, target_faults
from csdraft.heads.folder import Names, config_at, read_tensors, tensor_names
from csdraft.heads.head import Head
from csdraft.heads.layers import embeddings, fingerprint
from csdraft.heads.on_target import OnTarget, called
from csdraft.heads.self_draft import HEAD, read_document, write_document
from csdraft.heads.tied import Lender
from csdraft.stored import check_config, fit

__all__ = ["StoredHead", "head_at", "kind_at"]


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
    methods: Mapping[str, str] = {}
    """What serving engines, by the keys of `ENGINES`, call drafting with such a head."""

    def __init__(self, config: Any, options: Any, state: Mapping[str, Tensor], base: Lender | None = None):
        super().__init__(config, state)
        self.options, self.base = options, base

    # What a format says.

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        """Whether a folder holds such a head.

        Args:
            config: its config.json.
            names: gives the names of its tensors. Ask for them only if the config leaves it open: every model that is
                loaded comes by here.
        """
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

    @classmethod
    def weights(cls, path: str) -> dict[str, Tensor]:
        """The tensors of such a folder, by the names that they have there."""
        return read_tensors(path)

    def network(self, target: Any) -> Head:
        """A complete head for a target, without the stored weights."""
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """What it writes as config.json."""
        raise NotImplementedError

    def described(self) -> dict[str, str]:
        """What it is and what it needs, in a few words each, by topic."""
        raise NotImplementedError

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        """By serving engine, why it would not load its folder, or load it as another head; None if it loads it.

        Args:
            config: the folder's config.json.
        """
        raise NotImplementedError

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and tensors as an engine loads them; as `save` writes them unless the kind says otherwise.

        Args:
            engine: a key of `ENGINES`.
            target: what it is to draft for.
            tokens: drafted a round, for formats that say it.
        """
        return self.document(), self.written()

    def faults(
        self, engine: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ServedTarget | None = None
    ) -> list[str]:
        """Why an engine would not load a folder, or load it as another head; by default what `refusals` says.

        Args:
            engine: a key of `ENGINES`.
            config, tensors: of the folder.
            target: what it is to draft for; without it its sizes are not compared.
        """
        reason = self.refusals(config).get(ENGINES[engine], f"it has no {self.what}s")
        found = [] if reason is None else [reason]
        if target is not None:
            found += target_faults(target, self.target_width, self.config.vocab_size, self.read_layers)
        return found

    @property
    def target_width(self) -> int:
        """Width of the target's hidden states."""
        return self.config.hidden_size

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The hidden states of the target that it names, k for the one after k blocks."""
        return ()

    @property
    def deepest(self) -> int | None:
        """How many tokens it can draft a round in an engine; None: any number."""
        return None

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

    def written(self) -> dict[str, Tensor]:
        """The tensors of its file: `state`, and where it drafts only some tokens which these are."""
        tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in self.state.items()}
        if "d2t" in tensors:
            tensors["t2d"] = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            tensors["t2d"][tensors["d2t"] + torch.arange(len(tensors["d2t"]))] = True
        return tensors

    def save(self, folder: str | Path) -> None:
        """Writes what `load` reads."""
        self.write(folder, self.document(), self.written())

    def write(self, folder: str | Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes config.json, the tensors, and a drafter.json that names the target."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write_tensors(Path(folder), tensors)
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        write_document(folder, HEAD, {"base": asdict(self.base)} if self.base is not None else {})

    def write_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes the file of its tensors."""
        from safetensors.torch import save_file

        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})

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
    if config is None or (kind := kind_at(path, config, **options)) is None:
        return None
    check_config(config, f"{path}/config.json")
    return kind.load(path, config, **options)


def kind_at(path: str, config: Mapping[str, Any], **options: Any) -> type[StoredHead] | None:
    """The kind of head in a folder or at a Hub id; None if that holds something else.

    Args:
        config: its config.json.
        options: of the Hub: revision, token, ...
    """
    names = cache(lambda: tensor_names(path, **options))
    return next((kind for kind in kinds() if kind.recognises(config, names)), None)
