"""Heads on disk that no serving engine loads: csdraft's own layout, one for all kinds.

`config.json` holds the name of the kind (`csdraft_head`), its options, and the sizes of its layer; model.safetensors
holds the head without what the target lends; drafter.json names the target.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LlamaConfig

import csdraft.heads
from csdraft.amounts import count_text
from csdraft.heads.engines import ENGINES
from csdraft.heads.folder import OF_OTHER_TYPES, Names, check_drafted, check_tensors, read_layer, read_tensors
from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.stored_head import StoredHead
from csdraft.stored import fit, shown

__all__ = ["KIND", "OUTPUT", "OwnHead", "head_kinds"]

KIND = "csdraft_head"
OUTPUT = {"lm_head.weight": "output.weight"}
"""What the target lends to heads with `frozen_output`, see `StoredHead.lends`."""

NOT_WRITTEN = {"architectures", "dtype", "num_hidden_layers", "_name_or_path"}


@cache
def head_kinds() -> dict[str, type[Head]]:
    """The kinds of heads that are files of this folder and have options of their own, by the names of the files."""
    found = {}
    for module in pkgutil.iter_modules(csdraft.heads.__path__):
        for value in vars(importlib.import_module(f"csdraft.heads.{module.name}")).values():
            own = isinstance(value, type) and issubclass(value, Head) and value.Options is not HeadOptions
            if own and value.__module__.endswith(f".{module.name}"):
                found[module.name] = value
    return found


class OwnHead(StoredHead):
    """A head of any kind in this folder."""

    lends = StoredHead.lends | OUTPUT

    def network(self, target: Any) -> Head:
        return self.kind(self.config, self.options, self.draft_vocab)

    @property
    def kind(self) -> type[Head]:
        return next(kind for kind in head_kinds().values() if kind.Options is type(self.options))

    @property
    def name(self) -> str:
        """The name by which `init` asks for it."""
        return next(name for name, kind in head_kinds().items() if kind.Options is type(self.options))

    @property
    def what(self) -> str:  # type: ignore[override]
        return f"{self.name} head"

    @property
    def draft_vocab(self) -> int:
        """How many tokens it can draft."""
        return len(self.state["d2t"]) if "d2t" in self.names else self.config.vocab_size

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return KIND in config

    @classmethod
    def load(cls, path: str, config: Mapping[str, Any], **options: Any) -> OwnHead:
        at = f"{path}/config.json"
        name = fit(config[KIND], str, f"{at}: {KIND}")
        if name not in head_kinds():
            raise ValueError(
                f"{at}: {KIND}={shown(name)} is none of {', '.join(head_kinds())}; pip install -U csdraft"
            )
        kind = head_kinds()[name]
        described = fit(config.get("options"), kind.Options, f"{at}: options")
        layer = read_layer({key: value for key, value in config.items() if key not in (KIND, "options")}, at)
        layer.name_or_path = path
        state = {key: tensor for key, tensor in read_tensors(path, **options).items() if key != "t2d"}
        return cls.checked(path, layer, described, state, **options)

    @classmethod
    def checked(cls, path: str, layer: Any, described: Any, state: Mapping[str, Tensor], **options: Any) -> Self:
        """A head of these parts; ValueError unless the tensors are just those of such a head.

        Args:
            path: where they are from.
            layer: the config.
            described: the kind's options, by whose class the kind is known.
            state: the tensors.
            options: of the Hub: revision, token, ...
        """
        kind = next(kind for kind in head_kinds().values() if kind.Options is type(described))
        rows = len(state["d2t"]) if "d2t" in state else layer.vocab_size
        try:
            with torch.device("meta"):
                whole = kind(layer, described, rows)
        except OF_OTHER_TYPES as error:
            raise ValueError(f"{path}/config.json: no {kind.__name__} head has these options: {error}") from error
        optional = {"embed_tokens.weight"} | ({"d2t", "lm_head.weight"} if rows == layer.vocab_size else set())
        if not kind.frozen_output:
            optional.discard("lm_head.weight")
        check_tensors(path, state, whole, optional)
        check_drafted(state, layer.vocab_size, path)
        return cls(layer, described, state, cls.base_of(path, **options)).eval()

    def document(self) -> dict[str, Any]:
        written = {key: value for key, value in asdict(self.options).items() if key != "config"}
        sizes = LlamaConfig.from_dict(self.config.to_dict()).to_dict()
        sizes = {key: value for key, value in sizes.items() if key not in NOT_WRITTEN}
        return sizes | {KIND: self.name, "architectures": [self.kind.__name__], "options": written}

    def described(self) -> dict[str, str]:
        rows, vocab = self.draft_vocab, self.config.vocab_size
        numbers = sum(tensor.numel() for tensor in self.tensors)
        target = f"{self.base.name}, fingerprint {self.base.fingerprint}" if self.base is not None else "not said"
        options = {key: value for key, value in asdict(self.options).items() if key != "config"}
        return {
            "kind": f"{self.name} head, {count_text(numbers)} parameters",
            "options": ", ".join(f"{key}={value}" for key, value in options.items()),
            "target": f"{target}; width {self.config.hidden_size}, {vocab} tokens",
            "draft vocabulary": "all tokens" if rows == vocab else f"{rows} tokens",
        }

    def refusals(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        reason = f"it has no {config.get(KIND)} heads of csdraft's layout; decode with csdraft"
        return dict.fromkeys(ENGINES.values(), reason)
