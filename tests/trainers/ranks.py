"""Runs `process.py` in several processes, forked from one that has imported what they need; torchrun's import it each.

python -m tests.trainers.ranks NUMBER PORT RECIPE
"""

from __future__ import annotations

import os
import sys

from tests.trainers.process import run


def main(processes: int, port: str, words: list[str]) -> int:
    """0, or 1 if a process failed; gloo ends the others when it loses one."""
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run(words)
            sys.exit()
        children.append(child)
    return int(any([os.waitpid(child, 0)[1] for child in children]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
