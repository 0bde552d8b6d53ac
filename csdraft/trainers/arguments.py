"""Arguments of trainings and of scripts: a dataclass read from a flat YAML file and `key=value` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar, get_type_hints

import yaml
from transformers import TrainingArguments

from csdraft.data.target import check_at_least, option
from csdraft.data.text import read_utf8
from csdraft.stored import fit

__all__ = ["RunArguments", "make_arguments", "read_arguments", "read_values"]

T = TypeVar("T")
INHERITED = {field.name: field.type for field in fields(TrainingArguments)}
"""Keys of transformers, which takes more than some of their annotations say."""


@dataclass
class RunArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and the options that every training here has in addition."""

    muon: bool = option(
        False, "Muon for the weight matrices, AdamW for embeddings and output layers, instead of `optim`."
    )
    threads: int | None = option(None, "Threads of torch on the CPU; none leaves torch's default.")
    logging_nan_inf_filter: bool = option(False, "Without effect: a loss that is not finite stops the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_sampling_strategy != "random" or self.dataloader_drop_last:
            raise ValueError(
                "train_sampling_strategy and dataloader_drop_last have no effect: every row is read once an epoch, in "
                "random order; leave them out"
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps={self.max_steps} leaves nothing to train: give at least 1, or leave it out and give "
                "num_train_epochs"
            )
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} leaves nothing to train: give more than 0, or max_steps"
            )
        rows = "per_device_train_batch_size", "per_device_eval_batch_size"
        check_at_least(self, 1, *rows, "gradient_accumulation_steps", "threads")


def read_arguments(cls: type[T], config: str | None, overrides: list[str]) -> T:
    """`cls` from the keys of the YAML file `config` and from `key=value` strings, which take precedence."""
    return make_arguments(cls, read_values(config, overrides))


def read_values(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """The keys of a flat YAML file and of `key=value` strings, unchecked."""
    values = (_of_yaml(read_utf8(config), config, keys=True) or {}) if config else {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{config} holds other things than keys with values, such as max_steps: 100")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value, such as max_steps=100")
        values[key] = _of_yaml(value, f"{key}={value}")
    return values


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number, as YAML 1.2 does (YAML 1.1 wants a point in it), and takes no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [(key.tag, key.value) for key, _ in node.value if not key.tag.endswith((":merge", ":map", ":seq"))]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.composer.ComposerError(None, None, f"it has {twice[0][1]!r} twice", node.start_mark)
        return node


EXPONENT = "!exponent"
_Loader.add_implicit_resolver(EXPONENT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_constructor(EXPONENT, lambda _, node: float(node.value))


def _of_yaml(text: str, what: str, keys: bool = False) -> Any:
    """The value of a key, or of a file with `keys`. The key's `3e-4` stays text for `_typed`; in a list it is none."""
    try:
        loader = _Loader(text)
        if (node := loader.get_single_node()) is None:
            return None
        values = [value for _, value in node.value] if keys and isinstance(node, yaml.MappingNode) else [node]
        for value in values:
            value.tag = "tag:yaml.org,2002:str" if value.tag == EXPONENT else value.tag
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def make_arguments(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls` from these keys. For an unknown key, raises a ValueError that names the nearest known ones."""
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            whole = key.partition(".")[0]
            if whole != key and whole in known:
                raise ValueError(f'key {key!r} has a dot; give the whole of {whole}, such as "{whole}={{...}}"')
            nearest = ", ".join(difflib.get_close_matches(key, known, n=3, cutoff=0.0))
            raise ValueError(f"unknown key {key!r} for {cls.__name__}; the nearest known keys are {nearest}")
    hints = get_type_hints(cls)
    return cls(**{key: _typed(key, value, known[key], hints[key]) for key, value in values.items()})


def _typed(key: str, value: Any, field: Field, hint: Any) -> Any:
    """A value with the field's type. `_of_yaml` reads `3e-4` and `none` as text and a bare `no` as false."""
    default, kind = field.default, str(field.type)
    if value is False and isinstance(default, str):
        return "none" if default == "none" else "no"
    if value == "none" and default is None:
        return None
    numeric = isinstance(default, bool | int | float) or kind in ("float", "int | None", "float | None")
    whole = "int" in kind
    if not isinstance(value, str | float if whole else str) or not numeric or "str" in kind:
        loose = INHERITED.get(key) == field.type and hint not in (int, float)  # annotations of transformers
        return value if loose or value is default else fit(value, hint, key)
    if isinstance(default, bool):
        raise ValueError(f"{key}={value!r} must be true or false, such as {key}={str(default).lower()}")
    try:
        number = float(value)
    except ValueError:
        example = default if default is not None else 1 if whole else "2e-5"
        raise ValueError(f"{key}={value!r} must be a number, such as {key}={example}") from None
    if whole and not number.is_integer():
        raise ValueError(f"{key}={value!r} must be a whole number, such as {key}={default or 1}")
    return int(number) if whole else number
