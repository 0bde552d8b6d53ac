"""Runs scripts in processes of their own, which are forked from one that has imported the large packages already."""

from __future__ import annotations

import atexit
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    ["transformers.models.auto.modeling_auto", "datasets", "accelerate", "csdraft", "csdraft.trainers.run"]
)


class Forked:
    """What `subprocess.Popen` would be of `python WORDS`; all that it says goes to one file.

    Args:
        words: a script and what it is given, or -m, a module, and what that is given.
        environment: what differs from here; nothing that an import of torch, transformers or csdraft reads.
        file_size: no larger file may be written.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str] | None = None, file_size: int = 0) -> None:
        self._log = tempfile.NamedTemporaryFile("r", suffix=".log", encoding="utf-8")  # noqa: SIM115 - kept open
        given = [str(word) for word in words], {**os.environ, **(environment or {})}, self._log.name, file_size
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()
        atexit.register(self._process.kill)  # one that a failed test has left would be waited for

    def said(self) -> str:
        """So far."""
        return Path(self._log.name).read_text(encoding="utf-8")

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._log.name, timeout or 0, self.said())
        return status


def run(words: Sequence[str], timeout: float = 300, **options) -> tuple[int, str]:
    """The exit status and all that was said."""
    process = Forked(words, **options)
    return process.wait(timeout), process.said()


def _run(words: list[str], environment: dict[str, str], log: str, file_size: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    import torch

    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(ROOT))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[:0] = [str(Path(words[0]).parent), str(ROOT)]
        runpy.run_path(words[0], run_name="__main__")
