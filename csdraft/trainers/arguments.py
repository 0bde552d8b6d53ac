"""A flat YAML file and `key=value` overrides become one dataclass; unknown keys are errors."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = ["read_arguments"]

T = TypeVar("T")


def read_arguments(cls: type[T], config: str | None, overrides: list[str]) -> T:
    """`cls` from the keys of the YAML file `config`, then from `key=value` strings, which win."""
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {} if config else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value, such as max_steps=100")
        values[key] = yaml.safe_load(value)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in values:
        if key not in known:
            nearest = ", ".join(difflib.get_close_matches(key, known, n=3, cutoff=0.0))
            raise ValueError(f"unknown key {key!r} for {cls.__name__}; the nearest known keys are {nearest}")
    return cls(**{key: _number(value, known[key].default) for key, value in values.items()})


def _number(value: Any, default: Any) -> Any:
    """YAML 1.1 reads `3e-4` as text; where the default is a float, so is the value."""
    return float(value) if isinstance(value, str) and isinstance(default, float) else value
