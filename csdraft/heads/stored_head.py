"""Drafting heads in folders: the base of all formats, and which format a folder has.

A format is a file of `csdraft/heads/formats` with one subclass of `StoredHead`. The folder is the list of formats: a
new file needs no other change.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from csdraft.amounts import count_text
from csdraft.heads import formats
from csdraft.heads.engines import EMBEDDING, ServedHead, ServedTarget
from csdraft.heads.folder import (
    BROKEN_CONFIG,
    WEIGHTS,
    Names,
    check_drafted,
    check_tensors,
    config_at,
    read_tensors,
    tensor_names,
    write_tensors,
)
from csdraft.heads.formats._speculators import MODEL_TYPE
from csdraft.heads.head import LENDABLE, Head
from csdraft.heads.layers import embeddings
from csdraft.heads.on_target import called, frozen, set_parameter
from csdraft.heads.self_draft import HEAD, Lender, read_document, write_document
from csdraft.stored import check_config, fit, shown

__all__ = ["Parts", "StoredHead", "all_formats", "classes_in", "head_at", "kind_at"]

T = TypeVar("T")
Parts = tuple[Any, Any, dict[str, Tensor], list[str]]
"""What a folder holds: the layer's config, the kind's options, the head's own tensors, and what is assumed."""

LAYER_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "attention_bias",
    "mlp_bias", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "transformers_version",
)  # fmt: skip
"""Keys of a layer's config that are written for engines; a `LlamaConfig` has defaults for the others."""


class StoredHead(ServedHead):
    """A drafting head without the tensors that its target lends; `bind` completes it.

    Args:
        config: of the complete head.
        options: the kind's own.
        state: its own tensors, by their names in the complete head.
        base: the target that it was trained for, if that is known.

    Attributes:
        file, files: the file of its tensors; what it may be called, the preferred name first.
    """

    what, use = "drafting head", "reads hidden states of a target"
    file, files = WEIGHTS[0], WEIGHTS

    def __init__(self, config: Any, options: Any, state: Mapping[str, Tensor], base: Lender | None = None):
        super().__init__(config, state)
        self.options, self.base = options, base

    # What a format defines.

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        """Whether a folder holds such a head.

        Args:
            config: its config.json.
            names: reads the names of its tensors. Call it only if the config does not decide: `recognises` runs for
                every model that is loaded.
        """
        raise NotImplementedError

    @classmethod
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        """What a folder holds.

        Args:
            path: the folder, for messages.
            config: its config.json.
            state: its tensors, by the names that they have there.
            base: the target that its drafter.json names.
        """
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """The config.json that it writes."""
        raise NotImplementedError

    def exported(self, engine: str, target: ServedTarget, tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The config.json and the tensors that an engine loads; by default what `save` writes.

        Args:
            engine: a key of `ENGINES`.
            target: the model that it is to draft for.
            tokens: how many are drafted per round, for formats that store it.
        """
        return self.document(), self.written()

    @property
    def title(self) -> str:
        """What kind of head it is, for `csdraft inspect`."""
        return self.what

    def details(self) -> dict[str, str]:
        """More of what `csdraft inspect` prints, by topic."""
        return {}

    # Binding.

    def check(self, target: Any) -> None:
        """Raises ValueError if the target's sizes or weights are not those of the head's own target."""
        text = target.config.get_text_config(decoder=True)
        for key, wanted in {"hidden_size": self.target_width, "vocab_size": self.config.vocab_size}.items():
            if (found := getattr(text, key)) != wanted:
                raise ValueError(
                    f"{self._name} was trained for a target with {key}={wanted}, {called(target)} has {found}; "
                    "decode with the head's own target"
                )
        if max(self.read_layers, default=0) > text.num_hidden_layers:
            raise ValueError(
                f"{self._name} reads the hidden states after blocks {list(self.read_layers)}, and the target has "
                f"{text.num_hidden_layers} blocks; decode with the head's own target"
            )
        super().check(target)

    def open(self, target: Any, dtype: torch.dtype) -> Head:
        """See `OnTarget.open`; it holds copies of the target's tensors."""
        self.check(target)
        made = self._made(target, dtype)
        for name in made.lent:
            set_parameter(made, name, frozen(made.get_parameter(name).to(dtype, copy=True)))
        return made

    @torch.inference_mode(False)
    def _put_on(self, target: Any) -> Head:
        dtype = embeddings(target)["input.weight"].dtype
        made = self._made(target, dtype if dtype.is_floating_point else torch.float32)
        return made.requires_grad_(False).eval()

    def _made(self, target: Any, dtype: torch.dtype) -> Any:
        """The head on the target's device, with the target's tensors where it has none of its own."""
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
        made.lent = {name: key for name, key in LENDABLE.items() if name in own and name not in self.names}
        for name, source in made.lent.items():  # an output layer may be the embedding
            set_parameter(made, name, frozen(theirs.get(source, theirs["input.weight"])[: self.config.vocab_size]))
        made.base, made.stored_by = self.base, type(self)
        made.config._name_or_path = self.config._name_or_path
        return made

    # Reading.

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **hub: Any) -> Self:
        """Reads a folder; ValueError unless the tensors are those of such a head. One warning lists what is assumed.

        Args:
            config: its config.json.
            hub: options of the Hub: revision, token, ...
        """
        noted = (read_document(path, **hub) or {}).get("base")
        base = None if noted is None else fit(noted, Lender, f"{path}/drafter.json: base")
        layer, options, state, assumed = cls.parts(path, config, read_tensors(path, cls.files, **hub), base)
        made = cls(layer, options, state, base)
        try:
            with torch.device("meta"):
                whole = made.network()
        except BROKEN_CONFIG as error:
            raise ValueError(f"{path}/config.json: no {made.what} has these options: {error}") from error
        full = {"d2t"} if len(whole.d2t) == layer.vocab_size else set()
        check_tensors(path, state, whole.state_dict(), whole.lendable().keys() | full)
        check_drafted(state, layer.vocab_size, path)
        if assumed:
            warnings.warn(f"{path}/config.json: {'; '.join(assumed)}", stacklevel=2)
        return made.eval()

    @classmethod
    def weights(cls, path: str) -> dict[str, Tensor]:
        """The tensors of such a folder, by the names that they have there."""
        return read_tensors(path, cls.files)

    # Writing.

    @classmethod
    def of(cls, head: Any, state_dict: Mapping[str, Tensor] | None = None) -> Self:
        state = dict(head.state_dict() if state_dict is None else state_dict)
        state = {name: tensor for name, tensor in state.items() if name not in head.lent}
        if len(head.d2t) == head.config.vocab_size:
            del state["d2t"]
        return cls(head.config, head.options, state, head.base)

    def layer_document(self) -> dict[str, Any]:
        """The keys of config.json that describe its layer, and are the same in all engines' layouts."""
        return {key: self.config.to_dict().get(key) for key in LAYER_KEYS} | {
            "rope_theta": self.config.rope_parameters["rope_theta"],  # where older engines look for it
            "tie_word_embeddings": False,
            "dtype": str(self.state["fc.weight"].dtype).removeprefix("torch."),
        }

    def written(self) -> dict[str, Tensor]:
        """The tensors of its file: `state`, and `t2d` if it drafts only some tokens."""
        tensors = {name: tensor.cpu() for name, tensor in self.state.items()}
        if len(d2t := tensors.pop("d2t", torch.empty(0))) % self.config.vocab_size:  # engines read none of all tokens
            tensors["d2t"] = d2t.long()
            tensors["t2d"] = torch.zeros(self.config.vocab_size, dtype=torch.bool, device="cpu")
            tensors["t2d"][tensors["d2t"] + torch.arange(len(tensors["d2t"]), device="cpu")] = True
        return tensors

    def save(self, folder: str | Path) -> None:
        """Writes what `load` reads."""
        self.write(folder, self.document(), self.written())

    def write(self, folder: str | Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes config.json, the tensors, and a drafter.json that names the target."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder, self.file), tensors)
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        write_document(folder, HEAD, {"base": asdict(self.base)} if self.base is not None else {})

    # Describing.

    @property
    def target_name(self) -> str | None:
        """What the target is called, if that is known."""
        return None if self.base is None else self.base.name

    def described(self) -> dict[str, str]:
        """What it is and what it needs, in a few words, by topic."""
        numbers, vocab = sum(tensor.numel() for tensor in self.tensors), self.config.vocab_size
        rows = len(self.state["d2t"]) if "d2t" in self.names else vocab
        known = f", fingerprint {self.base.fingerprint}" if self.base is not None else ""
        return {
            "kind": f"{self.title}, {count_text(numbers)} parameters",
            "target": f"{self.target_name or 'not said'}{known}; width {self.target_width}, {vocab} tokens",
            "draft vocabulary": "all tokens" if rows == vocab else f"{rows} tokens",
            "embedding": "its own" if EMBEDDING in self.names else "the target's",
        } | self.details()


def classes_in(package: ModuleType, base: type[T]) -> Iterator[tuple[str, type[T]]]:
    """(file name, class) of every subclass of `base` that a file of a package defines."""
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{file.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__:
                yield file.name, value


@cache
def all_formats() -> tuple[type[StoredHead], ...]:
    """The subclasses of `StoredHead` in the folder of formats."""
    return tuple(kind for _, kind in classes_in(formats, StoredHead))


def head_at(path: str, **hub: Any) -> StoredHead | None:
    """The drafting head in a folder or at a Hub id; None if that holds something else."""
    config = config_at(path, **hub)
    if config is None or (kind := kind_at(path, config, **hub)) is None:
        return None
    check_config(config, f"{path}/config.json")
    return kind.load(path, config, **hub)


def kind_at(path: str, config: Mapping[str, Any], **hub: Any) -> type[StoredHead] | None:
    """The format of the head in a folder or at a Hub id; None if that holds something else.

    Raises:
        ValueError: it is a head in the layout of speculators, of a kind that csdraft does not know.
    """
    names = cache(lambda: tensor_names(path, **hub))
    found = next((kind for kind in all_formats() if kind.recognises(config, names)), None)
    if found is None and MODEL_TYPE in config:
        raise ValueError(
            f"{path}/config.json: {MODEL_TYPE}={shown(config[MODEL_TYPE])}; of the heads of speculators csdraft reads "
            "eagle3, peagle and dflash"
        )
    return found
