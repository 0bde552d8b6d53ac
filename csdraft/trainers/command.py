"""What scripts with a recipe have in common: a YAML file and `key=value` words in, one line of error, a status out."""

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
LETTING_GO = 0.5
"""Seconds; the thread needs the interpreter for microseconds."""


def run_script(doc: str | None, kind: type[T], work: Callable[[T], int | None]) -> None:
    """Reads the arguments, does the work, and exits: with 0, what `work` returns, or 1 after a line of error.

    Errors that csdraft raises on purpose have no traceback; all others have.

    Args:
        doc: of the script; its help.
        kind: dataclass of the keys.
        work: what the script does.
    """
    options = recipe_parser(doc, kind).parse_args()
    with one_line_errors():
        args: Any = read_arguments(kind, options.config, options.overrides)
    with one_line_errors(args.output_dir, work.__module__):
        status = work(args)
    leave_group()
    sys.exit(status or 0)


def leave_group() -> None:
    """Ends the connections to other processes, of a program that has ended well.

    A thread of gloo's (torch 2.13) that still holds a tensor of the last exchange aborts the program when Python is
    gone: it gets the time to let go.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(LETTING_GO)


@contextmanager
def one_line_errors(folder: str = "", module: str = "csdraft") -> Iterator[None]:
    """While entered, an error that the user can put right ends the program with a line and status 1, Ctrl-C with 130.

    Args:
        folder: that is written to.
        module: beside csdraft's own, whose ValueErrors and OSErrors are raised on purpose.
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
    """Takes `--config` (`required` or not) and `key=value` words; `--help` lists all keys of `kind`."""
    parser = argparse.ArgumentParser(
        description=doc, epilog=help_of(kind), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=required, help="a flat YAML file of the keys below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    return parser


def _is_ours(error: Exception, other: str) -> bool:
    """Whether a line of csdraft or of `other` raised it, or the Hub's client, which says what it cannot find."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: Any = frame.f_globals.get("__name__", "")
    ours = module == other or module.startswith("csdraft.")
    return ours or isinstance(error, Stopped) or type(error) is OSError


def _exit(status: int, message: str) -> None:
    """All processes exit, the first says why, below the line that shows progress if there is one."""
    if Part.of_environment().rank == 0:
        print(f"{chr(10) if sys.stderr.isatty() else ''}{message}", file=sys.stderr, flush=True)
    sys.exit(status)
