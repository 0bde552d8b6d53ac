"""The commands: `csdraft NAME` calls `run` of the file of that name. `csdraft_command.py` lists their arguments."""

from csdraft_command import main

__all__ = ["main"]
