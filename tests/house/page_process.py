"""Runs the blocks of a page in a process of its own, which is forked from one that has imported everything already."""

from __future__ import annotations

import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.forked import FORKS, ROOT


def run_page(name: str, blocks: list[str], log: Path, seconds: float = 300) -> str:
    """What went wrong in the blocks, run in order in one namespace; nothing if they ended well.

    A page may import, patch and set what it likes; its working directory is that of the caller.
    """
    process = FORKS.Process(target=_run, args=(name, blocks, log))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return f"still running after {seconds} seconds"
    return (
        "" if process.exitcode == 0 else f"exit status {process.exitcode}: {log.read_text(encoding='utf-8')[-3000:]}"
    )


def _run(name: str, blocks: list[str], log: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    space = {"__name__": "page"}
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            for block in blocks:
                exec(compile(block, name, "exec", dont_inherit=True), space)
        except BaseException:
            traceback.print_exc()
            file.flush()
            raise SystemExit(1) from None
