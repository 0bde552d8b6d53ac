"""The keys of a recipe as help and as a table: both come from the fields of its dataclass."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from transformers import TrainingArguments

from csdraft.trainers.run_arguments import RunArguments

__all__ = ["Key", "help_of", "keys_of", "markdown"]

WIDTH, COLUMN = 110, 28
"""Characters of a line of help, and where its meaning begins."""


class Key(NamedTuple):
    """One key.

    Attributes:
        default: as it is written in YAML; empty if the key is required.
        inherited: whether it is one of `transformers.TrainingArguments`, unchanged.
    """

    name: str
    default: str
    help: str
    inherited: bool


def keys_of(kind: type) -> list[Key]:
    """All keys of a dataclass: its own, those of all trainings, those of transformers.

    Raises:
        ValueError: a field does not say what it means (`metadata={"help": ...}`).
    """
    plain = {field.name: field for field in fields(TrainingArguments)}
    found = []
    for field in (field for field in fields(kind) if field.init):
        if not field.metadata.get("help"):
            raise ValueError(f"{kind.__name__}.{field.name} has no help: give its field metadata={{'help': ...}}")
        inherited = field.name in plain and field.metadata == plain[field.name].metadata
        meaning = " ".join(field.metadata["help"].split()).replace("%%", "%")  # argparse's way to write it
        found.append(Key(field.name, _default(field), meaning, inherited))
    common = {field.name for field in fields(RunArguments)}
    return sorted(found, key=lambda key: (key.inherited, key.name in common))


def _default(field: Field) -> str:
    if field.default_factory is not MISSING:
        return _yaml(field.default_factory())
    return "" if field.default is MISSING else _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(getattr(value, "value", value))


def help_of(kind: type) -> str:
    """The end of a script's `--help`: every key with its meaning and its default."""
    keys = keys_of(kind)
    groups = {
        "keys (default in brackets):": [key for key in keys if not key.inherited],
        "keys of transformers.TrainingArguments:": [key for key in keys if key.inherited],
    }
    return "\n\n".join("\n".join([title, *map(_line, group)]) for title, group in groups.items() if group)


def _line(key: Key) -> str:
    text = f"{key.help} [{key.default}]" if key.default else key.help
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_long_words=False, break_on_hyphens=False)
    name = f"  {key.name}".ljust(COLUMN - 1)
    first = [f"{name} {lines[0]}"] if len(name) < COLUMN else [name, " " * COLUMN + lines[0]]
    return "\n".join([*first, *(" " * COLUMN + line for line in lines[1:])])


def markdown(kind: type) -> str:
    """The keys that are not those of transformers, as a table."""
    rows = [f"| `{key.name}` | `{key.default}` | {key.help} |" for key in keys_of(kind) if not key.inherited]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *(row.replace("`` |", " |") for row in rows)])
