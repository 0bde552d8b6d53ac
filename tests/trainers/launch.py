"""Starts `process.py` in several real processes without GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

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


def start(
    folder: Path, name: str, engine: str = "ddp", processes: int = 2, script: Path | None = None, **changes: object
) -> subprocess.Popen:
    """A run in `folder/name` with these changes of `settings`, as it has just been started."""
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
    return subprocess.Popen(
        [sys.executable, *launched],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launch(folder: Path, name: str, engine: str = "ddp", processes: int = 2, **changes: object) -> Path:
    """The folder of a run that has ended well."""
    process = start(folder, name, engine, processes, **changes)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-6000:]
    return folder / name
