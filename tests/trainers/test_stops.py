"""A run stops at the first number that is not finite, at a full disk, at a signal: with one line, and a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from csdraft.trainers import run as run_module
from csdraft.trainers.checkpoints import flaw, last_checkpoint
from csdraft.trainers.run import distill
from csdraft.trainers.stops import NonFinite, Unwritable, writing
from tests import forked
from tests.trainers.launch import ROOT, start
from tests.trainers.pair import arguments, make_pair, settings

SCRIPT = ROOT / "scripts/distill_drafter.py"
RARE = "Q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a target that gives nan wherever it reads the letter Q, which one text has, the last of them."""
    folder = make_pair(tmp_path_factory.mktemp("stops"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder / "target", tie_word_embeddings=False)
    target, tokenizer = AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(folder / "target")
    with torch.no_grad():
        target.get_input_embeddings().weight[tokenizer(RARE)["input_ids"][0]] = torch.nan
    target.save_pretrained(folder / "broken-target")
    tokenizer.save_pretrained(folder / "broken-target")
    rows = [json.dumps({"text": f"x{i} = y\n"}) for i in range(31)] + [json.dumps({"text": f"{RARE} = y\n"})]
    (folder / "rare.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def rare(folder: Path, **changes: object) -> dict[str, object]:
    """A run of two epochs of eight steps that meets the row with nan somewhere in the first."""
    return {
        "target": str(folder / "broken-target"), "dataset": str(folder / "rare.jsonl"), "max_steps": 16,
        "save_steps": 1, "per_device_train_batch_size": 4,
    } | changes  # fmt: skip


# Numbers that are not finite.


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_of_nan_names_its_rows_and_leaves_the_last_checkpoint(folder, packing):
    options = rare(folder, packing=packing, max_length=24)
    with pytest.raises(NonFinite, match=r"step \d+: the loss is nan with rows .* of the data set") as caught:
        distill(arguments(folder, f"nan-{packing}", **options))
    message = str(caught.value)
    rows = [int(row) for row in re.search(r"with rows ([\d, ]+) of", message)[1].split(", ")]
    assert 31 in rows
    assert f"(row {rows[0]} begins '<|endoftext|>" in message
    assert len(rows) < 12
    assert "The target has weights that are not finite (model.embed_tokens.weight)" in message
    assert not (folder / f"nan-{packing}" / "model.safetensors").exists()
    last = last_checkpoint(f"{folder}/nan-{packing}")
    step = int(re.match(r"step (\d+)", message)[1])
    assert (last is None) == (step == 1)
    assert last is not None or not packing, "with packing the row comes later"
    if last is not None:
        assert last in message
        assert int(last.rpartition("-")[2]) + 1 == step
        assert all(tensor.isfinite().all() for tensor in load_file(f"{last}/model.safetensors").values())


@pytest.mark.slow
def test_all_processes_stop_where_one_has_nan(folder):
    process = start(folder, "nan-2", script=SCRIPT, **rare(folder, per_device_train_batch_size=2))
    said = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert len(re.findall(r"error: step \d+: the loss is nan with rows \d+, \d+ of the data set", said)) == 1
    assert re.search(r"with rows (31, \d+|\d+, 31) of", said)
    assert 'distill_drafter.py", line' not in said, "it has no traceback"


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled) -> None:
    """What `spoiled(target, student)` does is done to the models that a run loads."""
    load = run_module.load_models

    def loaded(*args):
        models = load(*args)
        spoiled(*models)
        return models

    monkeypatch.setattr(run_module, "load_models", loaded)


def test_a_gradient_that_is_infinite(folder, monkeypatch):
    """With a loss that is finite; the optimiser must not have seen it."""
    spoil(monkeypatch, lambda _, student: student.model.norm.weight.register_hook(lambda grad: grad * torch.inf))
    with pytest.raises(
        NonFinite, match=r"step 1: the gradient's norm is (inf|nan), the loss \d.* Try a learning_rate"
    ):
        distill(arguments(folder, "gradient"))
    assert not list((folder / "gradient").iterdir())


def test_weights_that_are_not_finite_are_not_saved(folder):
    """The last step makes them so, and there is no loss after it that could tell."""
    steep = {"learning_rate": 3e38, "losses": {"forward_kl": 1000.0}, "max_grad_norm": 1e9, "optim": "sgd"}
    with pytest.raises(NonFinite, match=r"step 1: weights are not finite \(model\.\S+\), and nothing was saved"):
        distill(arguments(folder, "overflow", max_steps=1, **steep))
    assert not list((folder / "overflow").iterdir())


# The disk.


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a-file")


def as_torch_says_it(*args: object, **options: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.fixture(scope="module")
def begun(folder) -> Path:
    """A run of two steps."""
    distill(arguments(folder, "begun", max_steps=2))
    return folder / "begun"


@pytest.mark.parametrize(
    ("what", "writer"),
    [
        ("csdraft.trainers.distill.save_student", no_space),
        pytest.param("torch.save", no_space, marks=pytest.mark.slow),
        ("torch.save", as_torch_says_it),
        pytest.param("transformers.TrainerState.save_to_json", no_space, marks=pytest.mark.slow),
        pytest.param("csdraft.trainers.base.mark_whole", no_space, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_error_and_no_half_checkpoint(folder, begun, monkeypatch, what, writer):
    name = f"full-{what}-{writer.__name__}"
    shutil.copytree(begun, folder / name)
    monkeypatch.setattr(what, writer)
    with pytest.raises(Unwritable, match=r"cannot be written: .*; [\d.]+ .?B are free in .* give the same command"):
        distill(arguments(folder, name, max_steps=4))
    monkeypatch.undo()
    assert last_checkpoint(f"{folder}/{name}") == f"{folder}/{name}/checkpoint-2"
    assert distill(arguments(folder, name, max_steps=4)).state.global_step == 4


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "checkpoint-2/config.json"),
            "checkpoint-2/config.json cannot be written: No space left on device; ",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "{folder} cannot be written: not all of it reached the disk (I/O error: No space left on device",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "{folder} cannot be written: not all of it reached the disk ([enforce fail",
        ),
    ],
)
def test_a_full_disk_names_place_and_reason(tmp_path, monkeypatch, error, said):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 4096))
    with pytest.raises(Unwritable) as caught, writing(tmp_path):
        raise error
    assert str(caught.value).startswith(said.format(folder=tmp_path))
    assert f"4.1 KB are free in {tmp_path}. Make room" in str(caught.value)


@pytest.mark.parametrize("what", ["csdraft.trainers.distill.describe", "csdraft.trainers.run_folder.write_whole"])
def test_a_disk_that_is_full_at_the_very_end(folder, monkeypatch, what):
    """The result is written when there is room, without another step."""
    name = f"end-{what}"
    monkeypatch.setattr(what, no_space)
    with pytest.raises(Unwritable, match="a-file cannot be written"):
        distill(arguments(folder, name))
    monkeypatch.undo()
    before = load_file(folder / name / "checkpoint-4/model.safetensors")
    trainer = distill(arguments(folder, name))
    assert trainer.state.global_step == 4
    assert all(tensor.equal(before[key]) for key, tensor in load_file(folder / name / "model.safetensors").items())


def run_script(folder: Path, name: str, *, file_size: int = 0, **changes: object) -> tuple[int, str]:
    """The status of the script in a process that may not write larger files, and what it said."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(json.dumps(settings(folder, name) | changes))
    return forked.run([str(SCRIPT), "--config", str(recipe)], timeout=120, file_size=file_size)


@pytest.mark.parametrize("file_size", [30_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_script_says_in_one_line_that_a_file_cannot_be_written(folder, file_size):
    status, said = run_script(folder, "limited", file_size=file_size)
    assert status == 1
    assert re.match(
        r"error: .*limited/checkpoint-2 cannot be written: not all of it reached the disk .*; .*B are free in .* Make "
        r"room, or raise the limit that was reached, and give the same command again.*\n$",
        said[said.index("error: ") :],
    )
    assert not list((folder / "limited").glob("checkpoint-*"))


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_processes_leaves_a_whole_checkpoint_and_a_status(folder, number):
    """One process by itself, with the status of the signal; the same run continues from there."""
    recipe = folder / "signal.yaml"
    name = f"signal-{number.name}"
    recipe.write_text(json.dumps(settings(folder, name, max_steps=4000, save_steps=10000)))
    process, deadline = forked.Forked([str(SCRIPT), "--config", str(recipe)]), time.monotonic() + 60
    while "'loss'" not in process.said():
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline, process.said()
        time.sleep(0.05)
    process.send_signal(number)
    status, said = process.wait(60), process.said()
    assert status == 128 + number
    found = re.search(r"stopped at step (\d+) of 4000; the same command continues from (\S+)", said)
    assert found, said
    assert flaw(Path(found[2])) is None
    assert found[2].endswith(f"checkpoint-{found[1]}")
    assert "Traceback" not in said
    step = int(found[1])
    trainer = distill(arguments(folder, name, max_steps=step + 2, save_steps=10000))
    assert trainer.state.global_step == step + 2
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == step + 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(folder):
    process = start(folder, "signal-2", script=SCRIPT, max_steps=4000, save_steps=10000)
    assert process.stdout is not None
    next(line for line in process.stdout if "'loss'" in line)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [pid for pid in children if "distill_drafter" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(ours) == 2
    os.kill(int(ours[1]), signal.SIGTERM)
    said = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert len(re.findall("stopped at step", said)) == 1, said
    last = last_checkpoint(f"{folder}/signal-2")
    assert last is not None
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} < {path.name for path in Path(last).iterdir()}
    shutil.rmtree(folder / "signal-2")


@pytest.mark.slow
def test_a_run_whose_launcher_has_gone_saves_and_ends_and_no_second_one_writes_there(folder):
    """accelerate's launcher of one process is ended by SIGTERM and leaves its child."""
    recipe = folder / "orphan.yaml"
    recipe.write_text(json.dumps(settings(folder, "orphan", max_steps=40000, save_steps=100000)))
    words = [str(SCRIPT), "--config", str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    launched = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert launched.stdout is not None
    next(line for line in launched.stdout if "'loss'" in line)
    number = (folder / "orphan/_lock").read_text()
    second = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=100)
    assert second.returncode == 1
    assert f"error: another run (process {number}) is writing to {folder}/orphan: wait for it" in second.stderr
    launched.send_signal(signal.SIGTERM)
    said = launched.communicate(timeout=60)[0]  # up to the end of the child, which has the other end
    assert "stopped at step" in said
    assert last_checkpoint(f"{folder}/orphan") is not None
    assert not (folder / "orphan/_lock").exists()
