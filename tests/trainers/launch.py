"""Starts `process.py` in several real processes without GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from tests import forked
from tests.trainers.pair import settings

ROOT = Path(__file__).parent.parent.parent


def launcher(folder: Path, engine: str, processes: int, port: int) -> list[str]:
    """torchrun for DDP of a script, else recipes/accelerate/<engine>.yaml in float32."""
    if engine == "ddp":
        return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    recipe = yaml.safe_load((ROOT / f"recipes/accelerate/{engine}.yaml").read_text())
    path = folder / f"accelerate-{engine}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"num_processes": processes, "use_cpu": True, "mixed_precision": "no"}))
    return ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", str(port)]


def prepared(
    folder: Path, name: str, engine: str, processes: int, script: Path | None, **changes: object
) -> tuple[list[str], dict[str, str]]:
    """What Python is given for a run in `folder/name` with these changes of `settings`, and the environment."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(settings(folder, name, ddp_backend="gloo") | changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    launched = launcher(folder, engine, processes, port)
    if script is not None:
        launched += [str(script), "--config", str(recipe)]
    elif engine == "ddp":
        launched = ["-m", "tests.trainers.ranks", str(processes), str(port), str(recipe)]
    else:
        launched += [str(Path(__file__).with_name("process.py")), str(recipe)]
    return launched, environment


def start(
    folder: Path, name: str, engine: str = "ddp", processes: int = 2, script: Path | None = None, **changes: object
) -> subprocess.Popen:
    """A run that has just been started, from nothing."""
    words, environment = prepared(folder, name, engine, processes, script, **changes)
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def launch(folder: Path, name: str, engine: str = "ddp", processes: int = 2, **changes: object) -> Path:
    """The folder of a run that has ended well."""
    if engine == "ddp":
        words, environment = prepared(folder, name, engine, processes, None, **changes)
        status, said = forked.run(words, timeout=400, environment=environment)
    else:
        process = start(folder, name, engine, processes, **changes)
        said = process.communicate(timeout=400)[0]
        status = process.returncode
    assert status == 0, said[-6000:]
    return folder / name
