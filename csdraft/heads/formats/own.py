"""csdraft's own layout, one for all kinds of heads that no serving engine loads.

`config.json` holds the name of the kind (`csdraft_head`), its options, and the sizes of its layer. model.safetensors
holds the head without the tensors that the target lends. drafter.json names the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from csdraft.heads import kinds
from csdraft.heads.folder import Names, read_layer
from csdraft.heads.head import Head, HeadOptions
from csdraft.heads.self_draft import Lender
from csdraft.heads.stored_head import Parts, StoredHead, classes_in
from csdraft.stored import fit

__all__ = ["KIND", "OwnHead", "head_kinds"]

KIND = "csdraft_head"
NOT_WRITTEN = {"architectures", "dtype", "num_hidden_layers", "_name_or_path"}


@cache
def head_kinds() -> dict[str, type[Head]]:
    """The kinds of heads that have their own class of options, by the names of their files."""
    return {name: kind for name, kind in classes_in(kinds, Head) if kind.Options is not HeadOptions}


class OwnHead(StoredHead):
    """A head of any kind."""

    def network(self, target: Any = None) -> Head:
        rows = len(self.state["d2t"]) if "d2t" in self.names else self.config.vocab_size
        return self.complete(self.config, self.options, rows)

    @property
    def name(self) -> str:
        """The name of its kind in a recipe's `init`."""
        return next(name for name, kind in head_kinds().items() if kind.Options is type(self.options))

    @property
    def complete(self) -> type[Head]:  # type: ignore[override]
        return head_kinds()[self.name]

    @property
    def what(self) -> str:  # type: ignore[override]
        return f"{self.name} head"

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Names) -> bool:
        return KIND in config

    @classmethod
    def parts(cls, path: str, config: Mapping[str, Any], state: dict[str, Tensor], base: Lender | None) -> Parts:
        at = f"{path}/config.json"
        if (name := fit(config[KIND], str, f"{at}: {KIND}")) not in head_kinds():
            raise ValueError(f"{at}: {KIND}={name!r} is none of {', '.join(head_kinds())}; pip install -U csdraft")
        options = fit(config.get("options"), head_kinds()[name].Options, f"{at}: options")
        layer = read_layer({key: value for key, value in config.items() if key not in (KIND, "options")}, path)
        return layer, options, {key: tensor for key, tensor in state.items() if key != "t2d"}, []

    def document(self) -> dict[str, Any]:
        sizes = LlamaConfig.from_dict(self.config.to_dict()).to_dict()
        sizes = {key: value for key, value in sizes.items() if key not in NOT_WRITTEN}
        return sizes | {KIND: self.name, "architectures": [self.complete.__name__], "options": self._own_options()}

    def _own_options(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.options).items() if key != "config"}

    def details(self) -> dict[str, str]:
        return {"options": ", ".join(f"{key}={value}" for key, value in self._own_options().items())}
