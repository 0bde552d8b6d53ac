"""A flat YAML file and `key=value` overrides become one dataclass; unknown keys are errors."""

import difflib
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = ["make_arguments", "read_arguments", "read_values"]

T = TypeVar("T")


def read_arguments(cls: type[T], config: str | None, overrides: list[str]) -> T:
    """`cls` from the keys of the YAML file `config`, then from `key=value` strings, which win."""
    return make_arguments(cls, read_values(config, overrides))


def read_values(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """The keys of a flat YAML file and of `key=value` strings, unchecked."""
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {} if config else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value, such as max_steps=100")
        values[key] = yaml.safe_load(value)
    return values


def make_arguments(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls` from these keys; ValueError with the nearest known ones for a key that it has not."""
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            whole = key.partition(".")[0]
            if whole != key and whole in known:
                raise ValueError(f'key {key!r} has a dot; give the whole of {whole}, such as "{whole}={{...}}"')
            nearest = ", ".join(difflib.get_close_matches(key, known, n=3, cutoff=0.0))
            raise ValueError(f"unknown key {key!r} for {cls.__name__}; the nearest known keys are {nearest}")
    return cls(**{key: _meant(key, value, known[key]) for key, value in values.items()})


def _meant(key: str, value: Any, field: Field) -> Any:
    """YAML 1.1 reads `3e-4` and `none` as text and a bare `no` as false; default and type say what is meant."""
    kind_of_field = str(field.type)
    if value is False and isinstance(field.default, str):
        return "none" if field.default == "none" else "no"
    if value == "none" and field.default is None:
        return None
    numeric = isinstance(field.default, bool | int | float) or kind_of_field in ("float", "int | None", "float | None")
    if not isinstance(value, str) or not numeric or "str" in kind_of_field:
        return value
    kind = "true or false" if isinstance(field.default, bool) else "a number"
    try:
        number = float(value) if kind == "a number" else None
    except ValueError:
        number = None
    if number is None:
        example = str(field.default).lower()
        if field.default is None:
            example = "1" if kind_of_field.startswith("int") else "2e-5"  # of all, learning_rate
        raise ValueError(f"{key}={value!r} must be {kind}, such as {key}={example}")
    whole = isinstance(field.default, int) or kind_of_field.startswith("int")
    return int(number) if whole and number.is_integer() else number
