"""A resumed run is the uninterrupted one to the bit, in any epoch, for any number of processes; and runs that are cut
up otherwise read the same rows in the same order, each once an epoch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from csdraft.trainers.distill import DrafterTrainer
from csdraft.trainers.run import distill
from tests.trainers.launch import launch
from tests.trainers.pair import arguments, make_pair

STEPS = 13
"""Of five in an epoch: 37 rows, 8 a step."""
RUN = {
    "max_steps": STEPS, "save_steps": 1, "logging_steps": 1, "dataset_limit": 22, "on_policy": 0.3,
    "optim": "adamw_torch", "learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("resume"))


def losses(run: Path) -> list[float]:
    log = json.loads((run / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def cut_off(run: Path, step: int) -> None:
    """What would be left of the run, had it been killed after this step."""
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def assert_resumes(folder: Path, name: str, step: int, again) -> None:
    """The run in `folder/name`, cut off after a step and run `again`, has the same losses and weights."""
    run, copied = folder / name, folder / f"{name}-again"
    shutil.copytree(run, copied)
    cut_off(copied, step)
    before = (copied / f"checkpoint-{step}" / "model.safetensors").stat().st_mtime_ns
    again(copied.name)
    assert losses(copied) == losses(run)
    whole, resumed = load_file(run / "model.safetensors"), load_file(copied / "model.safetensors")
    assert all(whole[key].equal(resumed[key]) for key in whole)
    assert (copied / f"checkpoint-{step}" / "model.safetensors").stat().st_mtime_ns == before
    shutil.rmtree(copied)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """One process with all rows of a step."""
    trainer = distill(arguments(folder, "alone", **RUN))
    assert trainer.state.epoch == pytest.approx(STEPS / 5), "the epochs of this test are five steps"
    return folder / "alone"


@pytest.mark.parametrize("step", [8, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 12))])
def test_one_process_resumes_in_any_epoch(folder, alone, step):
    assert_resumes(folder, "alone", step, lambda name: distill(arguments(folder, name, **RUN)))


@pytest.mark.parametrize(
    ("processes", "cut"),
    [
        pytest.param(2, {"per_device_train_batch_size": 4}, marks=pytest.mark.slow),
        pytest.param(2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"per_device_train_batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_processes_resume_within_the_second_epoch_and_read_what_one_reads(folder, alone, processes, cut):
    """Accelerate hides the sampler when batches are skipped; and it fills an epoch up with rows that were read."""
    name = f"{processes}-{len(cut)}"
    launch(folder, name, processes=processes, **RUN | cut)
    assert losses(folder / name) == pytest.approx(losses(alone), rel=1e-4)
    assert_resumes(folder, name, 7, lambda copied: launch(folder, copied, processes=processes, **RUN | cut))


@pytest.mark.slow
def test_packed_rows_resume_under_two_processes(folder):
    run = RUN | {"packing": True, "per_device_train_batch_size": 4, "dataset_limit": 64, "on_policy": 0.0}
    launch(folder, "packed", **run)
    assert_resumes(folder, "packed", 7, lambda name: launch(folder, name, **run))


@pytest.mark.slow
def test_random_numbers_are_restored_too(folder):
    """With dropout in the student, and packed rows; the sum that had not been logged is kept as well."""
    shutil.copytree(folder / "student", folder / "dropping")
    config = AutoConfig.from_pretrained(folder / "dropping")
    config.attention_dropout = 0.3
    config.save_pretrained(folder / "dropping")
    run = RUN | {"student": str(folder / "dropping"), "packing": True, "logging_steps": 3, "dataset_limit": 64}
    distill(arguments(folder, "drops", **run))
    assert_resumes(folder, "drops", 7, lambda name: distill(arguments(folder, name, **run)))


@pytest.mark.slow
def test_logs_and_checkpoints_follow_the_new_options(folder, alone):
    """transformers would go on with the steps that the checkpoint notes."""
    shutil.copytree(alone, folder / "more-often")
    cut_off(folder / "more-often", 6)
    trainer: DrafterTrainer = distill(arguments(folder, "more-often", **RUN | {"save_steps": 5, "logging_steps": 3}))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 9, 12]
    saved = {int(path.name.rpartition("-")[2]) for path in (folder / "more-often").glob("checkpoint-*")}
    assert saved == {1, 2, 3, 4, 5, 6, 10, 13}
