"""The keys of a recipe, as a script's help and as a table, from the fields of the recipe's dataclass."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from transformers import TrainingArguments

from csdraft.trainers.run_arguments import RunArguments

__all__ = ["Key", "help_of", "keys_of", "markdown"]

WIDTH, COLUMN = 110, 28
"""Width of the help, and the column where meanings begin."""


class Key(NamedTuple):
    """One key.

    Attributes:
        default: in YAML; empty if the key is required.
        inherited: whether it comes unchanged from `transformers.TrainingArguments`.
    """

    name: str
    default: str
    help: str
    inherited: bool


def keys_of(kind: type) -> list[Key]:
    """All keys of a dataclass: first its own, then those of all trainings, then those of transformers.

    Raises:
        ValueError: a field has no `metadata={"help": ...}`.
    """
    plain = {field.name: field.metadata for field in fields(TrainingArguments)}
    found = []
    for field in fields(kind):
        if not field.init:
            continue
        if not field.metadata.get("help"):
            raise ValueError(f"{kind.__name__}.{field.name} has no help: give its field metadata={{'help': ...}}")
        meaning = " ".join(field.metadata["help"].split()).replace("%%", "%")  # argparse's escape
        found.append(Key(field.name, _default(field), meaning, plain.get(field.name) == field.metadata))
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
    titles = ("keys (default in brackets; none is written null):", "keys of transformers.TrainingArguments:")
    groups = [[_line(key) for key in keys_of(kind) if key.inherited == inherited] for inherited in (False, True)]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in zip(titles, groups, strict=True) if lines)


def _line(key: Key) -> str:
    """A key's name, and its meaning and default in the second column."""
    text = f"{key.help} [{key.default}]" if key.default else key.help
    indent = " " * COLUMN
    meaning = textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    name = f"  {key.name}"
    return name + meaning[len(name) :] if len(name) < COLUMN else f"{name}\n{meaning}"


def markdown(kind: type) -> str:
    """The keys that do not come from transformers, as a table."""
    rows = [f"| `{key.name}` | `{key.default}` | {key.help} |" for key in keys_of(kind) if not key.inherited]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *(row.replace("`` |", " |") for row in rows)])
