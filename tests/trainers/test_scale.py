"""Two real processes give the losses of one with the same global batch: DDP, DeepSpeed ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from trainers.pair import arguments, make_pair, settings
from transformers import AutoModelForCausalLM

from csdraft.trainers.run import distill

ROOT = Path(__file__).parent.parent.parent
RUN = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "on_policy": 0.5, "save_steps": 2,
    "eval_strategy": "steps", "eval_steps": 3, "eval_new_tokens": 8, "adam_beta1": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    """The log of one process with 8 rows a step."""
    run = arguments(folder, "alone", per_device_train_batch_size=8, eval_prompts=f"{folder}/prompts.jsonl", **RUN)
    return distill(run).state.log_history


def launcher(folder: Path, engine: str, port: int) -> list[str]:
    """Two processes without GPUs: torchrun for DDP, else recipes/accelerate/<engine>.yaml in float32."""
    if engine == "ddp":
        return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    recipe = yaml.safe_load((ROOT / f"recipes/accelerate/{engine}.yaml").read_text())
    path = folder / f"accelerate-{engine}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    return ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", str(port)]


def launch(folder: Path, engine: str, *changes: str) -> None:
    recipe = folder / f"{engine}.yaml"
    prompts = f"{folder}/prompts.jsonl"
    run = settings(folder, engine, per_device_train_batch_size=4, eval_prompts=prompts, ddp_backend="gloo", **RUN)
    recipe.write_text(yaml.safe_dump(run))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [str(ROOT / "scripts/distill_drafter.py"), "--config", str(recipe), *changes]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher(folder, engine, port), *script],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))]
)
def test_two_processes_are_one(folder, alone, engine):
    if engine != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install csdraft[deepspeed]")
    launch(folder, engine)
    log = json.loads((folder / engine / "checkpoint-3/trainer_state.json").read_text())["log_history"]
    pairs = list(zip(numbers(log), numbers(alone), strict=True))
    assert len(pairs) > 5
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs), pairs
    one, two = weights(folder / engine), weights(folder / "alone")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    if engine == "ddp":  # and goes on from its checkpoint
        launch(folder, engine, "max_steps=4")
        assert (folder / engine / "checkpoint-4").is_dir()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def numbers(log: list[dict]) -> list[float]:
    """Losses and figures of the exam, in order."""
    kept = ("loss", "grad_norm", "eval_block_efficiency", "eval_acceptance", "eval_agreement")
    return [entry[name] for entry in log for name in kept if name in entry and name != "grad_norm"]
