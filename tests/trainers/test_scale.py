"""Two real processes give the losses and gradients of one with the same global batch: DDP, FSDP, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from csdraft.trainers.run import distill
from tests.trainers.launch import ROOT
from tests.trainers.launch import launch as launched
from tests.trainers.pair import arguments, make_pair, settings

RUN = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "on_policy": 0.5, "save_steps": 1,
    "eval_strategy": "steps", "eval_steps": 3, "eval_new_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """What one process leaves that has 8 rows a step."""
    distill(arguments(folder, "alone", per_device_train_batch_size=8, eval_prompts=f"{folder}/prompts.jsonl", **RUN))
    return folder / "alone"


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Path:
    """What two processes leave that have 4 rows each."""
    return launch(folder, "ddp")


def launch(folder: Path, engine: str, name: str | None = None, **changes: object) -> Path:
    """The folder of a run of two processes, named as the engine if not otherwise."""
    evaluated = {"per_device_train_batch_size": 4, "eval_prompts": f"{folder}/prompts.jsonl"}
    return launched(folder, name or engine, engine, **evaluated | RUN | changes)


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_a_step_is_cut_up(folder, alone, ddp):
    """One step of SGD: 1 process x 8 rows, 2 x 4, and 1 x 1 x 8 accumulated, texts unequal and half of them new."""
    distill(
        arguments(
            folder, "accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=8,
            **RUN | {"max_steps": 1, "eval_strategy": "no"},
        )
    )  # fmt: skip
    start = weights(folder / "student")
    gradients = [
        {name: (start[name] - after) / RUN["learning_rate"] for name, after in weights(run / "checkpoint-1").items()}
        for run in (alone, ddp, folder / "accumulated")
    ]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-3, name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_data_parallel_processes_are_one(folder, alone, ddp):
    assert_same_run(ddp, alone)
    assert shares(ddp) == [{"student": 1, "target": 1}] * 2
    launch(folder, "ddp", max_steps=4)  # continues from its checkpoint
    assert (ddp / "checkpoint-4").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cpu", "ddp"])
def test_recipes_start_two_processes_without_gpus(folder, recipe):
    """As the docs say it, with the script itself: each process has its random numbers in the checkpoint."""
    options = folder / f"two-{recipe}.yaml"
    options.write_text(yaml.safe_dump(settings(folder, f"two-{recipe}", max_steps=1)))
    command = ["--config_file", str(ROOT / f"recipes/accelerate/{recipe}.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", "--mixed_precision", "no"]
    command += [str(ROOT / "scripts/distill_drafter.py"), "--config", str(options)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    noted = json.loads((folder / f"two-{recipe}/checkpoint-1/run.json").read_text())
    assert noted["options"]["processes"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= noted["files"].keys()


def test_one_process_where_several_were_asked_for_is_said(folder, monkeypatch, capsys):
    """What accelerate leaves in the environment for --cpu --num_processes 2."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    distill(arguments(folder, "one", max_steps=1))
    assert "asked for several processes and has started one; leave out --cpu" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_processes_that_share_a_student_are_one(folder, alone, engine):
    need_deepspeed(engine.startswith("zero"))
    run = launch(folder, engine)
    assert_same_run(run, alone)
    for share in shares(run):
        assert share["target"] == 1
        assert share["student"] == 1 if engine == "zero2" else share["student"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_processes_that_share_a_student_continue_from_a_checkpoint(folder, engine):
    """With Adam's state: of an optimiser without any, torch cannot restore what FSDP had (2.13)."""
    need_deepspeed(engine == "zero3")
    changes = {"optim": "adamw_torch", "eval_strategy": "no"}
    whole = numbers(launch(folder, engine, f"whole-{engine}", **changes))
    launch(folder, engine, f"again-{engine}", **changes | {"max_steps": 2})
    assert numbers(launch(folder, engine, f"again-{engine}", **changes)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_processes_that_share_a_target_are_one(folder, alone, engine):
    need_deepspeed()
    run = launch(folder, engine, f"target-{engine}", target_sharded=True)
    assert_same_run(run, alone)
    assert all(share["target"] < 0.1 for share in shares(run))  # between two uses a process lists none but norms


def need_deepspeed(needed: bool = True) -> None:
    if needed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install csdraft[deepspeed]")


def assert_same_run(run: Path, alone: Path) -> None:
    """Losses, figures of the evaluation, and weights."""
    pairs = list(zip(numbers(run), numbers(alone), strict=True))
    assert len(pairs) > 5
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs), pairs
    one, two = weights(run), weights(alone)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def shares(run: Path) -> list[dict[str, float]]:
    """What part of both models each process holds at the end."""
    return [json.loads((run / f"held-{rank}.json").read_text()) for rank in (0, 1)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def numbers(run: Path) -> list[float]:
    """Losses and figures of the evaluation, in order."""
    log = json.loads((run / "checkpoint-3/trainer_state.json").read_text())["log_history"]
    kept = ("loss", "eval_block_efficiency", "eval_acceptance", "eval_agreement")
    return [entry[name] for entry in log for name in kept if name in entry]
