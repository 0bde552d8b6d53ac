"""The one entry of all benchmarks: `python -m benchmarks COMMAND ...`, from the repository's root."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "suites": "pair",
    "picture": "picture",
    "lookup": "lookup",
    "memory": "loss_memory",
    "methods": "breadth",
    "training": "training",
    "arms": "arms",
    "verifiers": "verifiers",
    "never-loses": "never_loses",
    "tasks": "tasks",
    "replay": "replays",
    "gpu": "gpu",
    "forwards": "forwards",
}
"""Command -> the module of this folder that has its `main(argv)`, which returns the exit status."""


def main(argv: Sequence[str]) -> int:
    """Runs one command; 0 if all went well, 1 if a claim failed, 2 if there is no such command."""
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        return module_of(name).main(rest) or 0
    print("usage: python -m benchmarks COMMAND ...\n\nCommands (each has a --help):")
    for known in COMMANDS:
        print(f"  {known:13}{(module_of(known).__doc__ or '').partition(chr(10))[0]}")
    if name in ("-h", "--help"):
        sys.exit(0)
    print(f"\nthere is no command {name!r}", file=sys.stderr)
    return 2


def module_of(command: str):
    return importlib.import_module(f"benchmarks.{COMMANDS[command]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
