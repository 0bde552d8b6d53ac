"""The command line: `csdraft COMMAND`. A file of this folder is a command; being there is all the registration."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

import csdraft

__all__ = ["commands", "main"]


def commands() -> dict[str, ModuleType]:
    """The modules of this folder by name, but for those that begin with an underscore.

    A command has a docstring, `add_arguments(parser)` and `run(args)`, which returns the exit status.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if all went well, 1 if a check failed, 2 if what was asked makes no sense."""
    argv = sys.argv[1:] if argv is None else list(argv)
    found = commands()
    forwarding = {name: module.main for name, module in found.items() if "main" in module.__all__}
    if argv and argv[0] in forwarding:
        return forwarding[argv[0]](argv[1:]) or 0
    parser = argparse.ArgumentParser("csdraft", description=(csdraft.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"csdraft {csdraft.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in found.items():
        text = (module.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            name, help=text.partition("\n")[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return found[args.command].run(args) or 0
    except BrokenPipeError:  # the reader has seen enough: `csdraft report FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # what the user can put right: no traceback
        print(f"csdraft {args.command}: {error}", file=sys.stderr)
        return 2
