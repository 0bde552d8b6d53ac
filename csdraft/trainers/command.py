"""Scripts that take a recipe: arguments from YAML and `key=value`, help for all keys, errors, exit statuses."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple, TypeVar

from torch import distributed
from transformers import TrainingArguments

from csdraft.data.shards import Part
from csdraft.trainers.arguments import RunArguments, read_arguments
from csdraft.trainers.stops import FULL, Stopped, unwritable

__all__ = ["Key", "help_of", "keys_of", "leave_group", "markdown", "one_line_errors", "recipe_parser", "run_script"]

T = TypeVar("T")
GLOO_PAUSE = 0.5
"""Seconds to wait for gloo's threads."""
WIDTH, COLUMN = 110, 28
"""Width of the help, and the column where meanings begin."""


def run_script(doc: str | None, kind: type[T], work: Callable[[T], int | None]) -> None:
    """Reads the arguments, calls `work`, and exits: with 0, with the status that `work` returns, or with 1 on error.

    Errors that csdraft raises on purpose are printed in one line; all others have a traceback. The help is the
    script's docstring and the keys of `kind`.
    """
    options = recipe_parser(doc, kind).parse_args()
    with one_line_errors():
        args: Any = read_arguments(kind, options.config, options.overrides)
    with one_line_errors(args.output_dir, work.__module__):
        status = work(args)
    leave_group()
    sys.exit(status or 0)


def leave_group() -> None:
    """Closes the connections to other processes, at the end of a program.

    A gloo thread (torch 2.13) that still holds a tensor of the last exchange aborts the program when Python exits, so
    this waits for it a little.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(GLOO_PAUSE)


@contextmanager
def one_line_errors(folder: str = "", module: str = "csdraft") -> Iterator[None]:
    """While entered, errors that the user can fix end the program with one line and status 1, Ctrl-C with status 130.

    Args:
        folder: where the program writes.
        module: a further module whose ValueErrors and OSErrors are for the user, as csdraft's are.
    """
    try:
        yield
    except KeyboardInterrupt:
        _exit(130, "stopped at once; the same command continues from what is there")
    except (ValueError, OSError, Stopped) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _exit(1, f"error: {unwritable(folder, error)}")
        if not _is_ours(error, module):
            raise
        _exit(1, f"error: {error}")


def recipe_parser(doc: str | None, kind: type, required: bool = False) -> argparse.ArgumentParser:
    """A parser of `--config` and `key=value` words, whose `--help` lists all keys of `kind`."""
    parser = argparse.ArgumentParser(
        description=doc, epilog=help_of(kind), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=required, help="a flat YAML file of the keys below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file")
    return parser


def _is_ours(error: Exception, other: str) -> bool:
    """Whether csdraft, `other` or the Hub's client (an OSError that says what it cannot find) raised the error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: Any = frame.f_globals.get("__name__", "")
    return module == other or module.startswith("csdraft.") or isinstance(error, Stopped) or type(error) is OSError


def _exit(status: int, message: str) -> None:
    """Every process exits; the first prints the message, below the progress line if there is one."""
    if Part.of_environment().rank == 0:
        print(f"{chr(10) if sys.stderr.isatty() else ''}{message}", file=sys.stderr, flush=True)
    sys.exit(status)


# The keys of a recipe.


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
