"""Shared parts of scripts that take a recipe: arguments from YAML and `key=value`, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

from csdraft.data.shards import Part
from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.keys import help_of
from csdraft.trainers.stops import FULL, Stopped, unwritable

__all__ = ["leave_group", "one_line_errors", "recipe_parser", "run_script"]

T = TypeVar("T")
GLOO_PAUSE = 0.5
"""Seconds to wait for gloo's threads."""


def run_script(doc: str | None, kind: type[T], work: Callable[[T], int | None]) -> None:
    """Reads the arguments, calls `work`, and exits: with 0, with the status that `work` returns, or with 1 on error.

    Errors that csdraft raises on purpose are printed in one line; all others have a traceback.

    Args:
        doc: the script's docstring, for its help.
        kind: dataclass of the keys.
        work: takes the arguments.
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
    """Inside, an error that the user can fix ends the program with one line and status 1, Ctrl-C with status 130.

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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
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
