"""A command that is given again: finished runs stay, changed options are refused, broken checkpoints skipped."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from csdraft.data.target_cache import CacheArguments, cache_logits
from csdraft.trainers import checkpoints
from csdraft.trainers import run as run_module
from csdraft.trainers.checkpoints import FREE, options_of
from csdraft.trainers.distill_arguments import DistillArguments
from csdraft.trainers.run import distill, is_finished
from csdraft.trainers.run_folder import LOCK, RunFolder, only_run
from recipes.smol.pretrain import PretrainArguments
from tests.trainers.launch import ROOT
from tests.trainers.pair import arguments, make_pair, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A finished run of four steps with checkpoints 2 and 4; a test that changes it takes `copied`."""
    distill(arguments(folder, "done"))
    return folder / "done"


@pytest.fixture
def copied(folder: Path, done: Path, request: pytest.FixtureRequest) -> Path:
    path = folder / request.node.name.replace("[", "-").replace("]", "").replace("/", "-")
    shutil.copytree(done, path)
    return path


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


# Finished.


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_finished_run_is_left_as_it_is(folder, copied, checkpoints, capsys):
    """Also where its checkpoints were removed to save room; the trainer has the result all the same."""
    if not checkpoints:
        for path in copied.glob("checkpoint-*"):
            shutil.rmtree(path)
    before = contents(copied)
    trainer = distill(arguments(folder, copied.name))
    assert contents(copied) == before
    said = capsys.readouterr().out
    assert f"finished: {copied} holds the result of all 4 steps; nothing to do" in said
    assert "raise max_steps or num_train_epochs" in said
    assert "another output_dir" in said
    assert trainer.state.global_step == 4
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 4
    trainer.save_model(str(folder / f"{copied.name}-again"))
    assert (folder / f"{copied.name}-again/model.safetensors").read_bytes() == before[f"{copied}/model.safetensors"][1]


def test_a_finished_run_whose_cache_was_removed_is_finished(folder):
    options = {"target": f"{folder}/target", "dataset": f"{folder}/texts.jsonl", "max_length": 48, "k": 4}
    cache_logits(CacheArguments(**options, output_dir=f"{folder}/logits"))
    args = arguments(folder, "cached", target_cache=f"{folder}/logits")
    distill(args)
    shutil.rmtree(folder / "logits")
    assert is_finished(args)


def test_a_template_may_be_longer_than_the_name_of_a_file(folder):
    assert options_of(arguments(folder, "long", chat_template="{{ messages }}" * 30))["chat_template"]


def test_muon_is_refused_where_an_engine_splits_matrices(folder):
    trainer = distill(arguments(folder, "muon", muon=True))
    trainer.optimizer, trainer.is_deepspeed_enabled = None, True
    with pytest.raises(ValueError, match="muon=true needs whole matrices"):
        trainer.create_optimizer()


@pytest.mark.slow
def test_epochs_are_counted_as_well_as_steps(folder):
    """The last step of an epoch, where transformers would begin another."""
    short = {"max_steps": -1, "num_train_epochs": 1, "dataset_limit": 8, "save_strategy": "epoch"}
    steps = distill(arguments(folder, "epochs", **short)).state.global_step
    assert is_finished(arguments(folder, "epochs", **short))
    assert is_finished(arguments(folder, "epochs", **short | {"max_steps": steps}))
    assert not is_finished(arguments(folder, "epochs", **short | {"max_steps": steps + 1}))
    longer = distill(arguments(folder, "epochs", **short | {"num_train_epochs": 1.5}))
    assert steps < longer.state.global_step < 2 * steps


def test_the_script_does_not_load_anything_for_a_finished_run(folder, done, monkeypatch, capsys):
    recipe = folder / "finished.yaml"
    recipe.write_text(json.dumps(settings(folder, "done")))
    monkeypatch.setattr(run_module, "load_models", lambda *_: pytest.fail("the target was loaded"))
    monkeypatch.setattr(sys, "argv", ["distill_drafter.py", "--config", str(recipe)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/distill_drafter.py"), run_name="__main__")
    assert not ended.value.code
    assert "nothing to do" in capsys.readouterr().out


def test_a_finished_run_on_other_data_is_not_taken_for_the_same(folder, copied, monkeypatch, tmp_path):
    """A folder's last name is the same, and so is every option."""
    monkeypatch.setattr(run_module, "load_models", lambda *_: pytest.fail("the target was loaded"))
    other = tmp_path / "texts.jsonl"
    other.write_text((folder / "texts.jsonl").read_text().replace("x1", "z1"))
    for run in (is_finished, distill):
        with pytest.raises(ValueError, match=r"holds a run on data with .*checksum=.* now it is"):
            run(arguments(folder, copied.name, dataset=str(other)))


def test_the_same_rows_in_another_file_are_the_same_data(folder, copied, tmp_path, capsys):
    shutil.copy(folder / "texts.jsonl", tmp_path / "texts.jsonl")
    distill(arguments(folder, copied.name, dataset=str(tmp_path / "texts.jsonl")))
    assert "nothing to do. To train" in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_result_was_written_takes_no_step_more(folder, copied):
    for path in copied.iterdir():
        if not path.is_dir():
            path.unlink()
    trainer = distill(arguments(folder, copied.name))
    assert trainer.state.global_step == 4
    assert (copied / "model.safetensors").read_bytes() == (copied / "checkpoint-4/model.safetensors").read_bytes()


def test_a_longer_run_continues_and_a_new_one_begins_again(folder, copied, capsys):
    assert distill(arguments(folder, copied.name, max_steps=5)).state.global_step == 5
    assert f"resumed from {copied}/checkpoint-4" in capsys.readouterr().out
    again = distill(arguments(folder, copied.name, max_steps=2, resume_from_checkpoint=False, learning_rate=0.02))
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2]
    assert is_finished(arguments(folder, copied.name, max_steps=2, learning_rate=0.02))
    distill(arguments(folder, copied.name, max_steps=3, learning_rate=0.02))
    assert f"resumed from {copied}/checkpoint-2" in capsys.readouterr().out, "the newest, not the highest number"


# Other options.


CHANGED = {
    "a loss": ({"losses": {"jsd": 1.0}}, r"losses={'forward_kl': 1.0}, now it is {'jsd': 1.0}"),
    "a learning rate": ({"learning_rate": 0.02}, r"learning_rate=0.01, now it is 0.02"),
    "a schedule": ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type='constant', now it is .*'linear'"),
    "an optimiser": (
        {"optim": "sgd", "weight_decay": 0.1},
        r"optim='adamw.*', now it is 'sgd'; weight_decay=0.0, now it is 0.1",
    ),
    "a data set": ({"dataset": "{folder}/prompts.jsonl"}, r"dataset='texts.jsonl', now it is 'prompts.jsonl'"),
    "a length": ({"max_length": 40}, r"max_length=48, now it is 40"),
    "packing": ({"packing": True}, r"packing=False, now it is True"),
    "a seed": ({"seed": 1}, r"seed=42, now it is 1"),
    "rows a step": ({"per_device_train_batch_size": 4}, r"batch_size=8, now it is 4"),
    "on-policy": ({"on_policy": 0.5}, r"on_policy=0.0, now it is 0.5"),
    "a student": ({"student": "{folder}/target"}, r"student='student', now it is 'target'"),
    "a temperature": ({"target_temperature": 0.5}, r"target_temperature=1.0, now it is 0.5"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", CHANGED)
def test_other_options_are_refused_before_the_target_is_loaded(folder, done, what, finished, monkeypatch):
    monkeypatch.setattr(run_module, "load_models", lambda *_: pytest.fail("the target was loaded"))
    changes, words = CHANGED[what]
    changes = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()}
    steps = {} if finished else {"max_steps": 9}
    with pytest.raises(
        ValueError, match=rf"done\S* holds a run with .*{words}\. Resume with .*resume_from_checkpoint=false"
    ):
        distill(arguments(folder, "done", **changes | steps))
    elsewhere = {"resume_from_checkpoint": str(done / "checkpoint-2")}
    with pytest.raises(ValueError, match=words):
        distill(arguments(folder, "elsewhere", **changes | elsewhere))


def test_other_rows_under_the_same_name_are_refused(folder, copied, monkeypatch):
    monkeypatch.setattr(run_module, "load_models", lambda *_: pytest.fail("the target was loaded"))
    texts = folder / "texts.jsonl"
    before = texts.read_text()
    try:
        texts.write_text(before + json.dumps({"text": "one more"}) + "\n")
        with pytest.raises(
            ValueError, match=r"holds a run on data with rows=\d+, now it is \d+; tokens=\d+, now it is"
        ):
            distill(arguments(folder, copied.name, max_steps=5))
    finally:
        texts.write_text(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 5, "save_steps": 3, "save_total_limit": 2, "report_to": "none", "disable_tqdm": False},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"chunk": 16, "dataloader_num_workers": 1, "activation_checkpointing": True},
        {"eval_prompts": "{folder}/prompts.jsonl", "eval_strategy": "steps", "eval_steps": 3, "eval_new_tokens": 4},
    ],
)
def test_what_changes_no_weight_may_change(folder, copied, changes):
    changes = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()}
    assert distill(arguments(folder, copied.name, max_steps=6, **changes)).state.global_step == 6


def test_all_keys_that_may_change_exist():
    known = {field.name for kind in (TrainingArguments, DistillArguments, PretrainArguments) for field in fields(kind)}
    named = [key for keys in FREE.values() for key in keys.split()]
    assert len(named) == len(set(named))
    assert set(named) <= known


def test_a_run_may_lock_its_folder_twice_and_another_may_not(tmp_path):
    with only_run(str(tmp_path)), only_run(str(tmp_path)):
        code = f"import filelock; filelock.FileLock({str(tmp_path / LOCK)!r}, blocking=False).acquire()"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "Timeout" in other.stderr
    assert not (tmp_path / LOCK).exists()


# Checkpoints that are cut short.


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros(path: Path) -> None:
    """What a power failure leaves of a file whose size was on the disk before its content."""
    path.write_bytes(bytes(path.stat().st_size))


def second_half(path: Path) -> None:
    """What a power failure leaves of a file whose last pages were not on the disk."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def without(key: str):
    def change(path: Path) -> None:
        path.write_text(json.dumps({k: value for k, value in json.loads(path.read_text()).items() if k != key}))

    return change


BROKEN = {
    "zeros for half the weights": ("model.safetensors", second_half, "model.safetensors is damaged: its checksum"),
    "zeros for half the optimiser": ("optimizer.pt", second_half, "optimizer.pt is damaged: its checksum"),
    "a mark of another kind": ("run.json", lambda path: path.write_text("[1]"), "run.json cannot be read"),
    "a mark without files": ("run.json", without("files"), "run.json cannot be read"),
    "cut weights": ("model.safetensors", cut, r"model.safetensors has [\d,]+ of [\d,]+ bytes"),
    "no optimiser": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "half an optimiser": ("optimizer.pt", cut, "optimizer.pt has"),
    "a cut state": ("trainer_state.json", cut, "trainer_state.json has"),
    "an empty file": ("scheduler.pt", lambda path: os.truncate(path, 0), "scheduler.pt has 0 of"),
    "no random numbers": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "zeros for weights": ("model.safetensors", zeros, "model.safetensors is damaged: its checksum"),
    "zeros for the state": ("trainer_state.json", zeros, "trainer_state.json is damaged: its checksum"),
    "killed before its mark": ("run.json", Path.unlink, "run.json is missing"),
    "half a mark": ("run.json", cut, "run.json cannot be read"),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if n % 2 else []) for n, what in enumerate(BROKEN)]
)
def test_a_broken_checkpoint_is_passed_over_with_its_reason(folder, copied, what, capsys):
    name, breaks, reason = BROKEN[what]
    (copied / "finished.json").unlink()
    breaks(copied / "checkpoint-4" / name)
    trainer = distill(arguments(folder, copied.name, max_steps=4))
    said = capsys.readouterr().out
    assert f"skipped {copied}/checkpoint-4, which is not whole: " in said
    assert re.search(reason, said)
    assert f"resumed from {copied}/checkpoint-2" in said
    assert trainer.state.global_step == 4
    (copied / "finished.json").unlink()
    for step in (2, 4):
        (copied / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"no whole checkpoint to resume from \(checkpoint-4: .*; checkpoint-2: .*\). Give"
    ):
        distill(arguments(folder, copied.name, max_steps=4))
    with pytest.raises(ValueError, match=r"holds no whole checkpoint: optimizer\.pt is missing"):
        distill(arguments(folder, copied.name, resume_from_checkpoint=str(copied / "checkpoint-2")))


def test_only_the_checkpoint_to_resume_from_is_read(folder, copied, monkeypatch):
    (copied / "finished.json").unlink()
    read, checksum = [], checkpoints._checksum
    monkeypatch.setattr(checkpoints, "_checksum", lambda path: read.append(path) or checksum(path))
    RunFolder(arguments(folder, copied.name, max_steps=5))
    assert {path.parent.name for path in read} == {"checkpoint-4"}
    RunFolder(arguments(folder, copied.name, max_steps=5))
    assert len(read) == len(set(read)), "once"


@pytest.mark.parametrize("content", ["[1]", "{}", '{"state": {}}', '{"options": {}, "state": {"epoch": 1}}', "{"])
def test_an_odd_note_of_a_finished_run_is_passed_over(folder, copied, content, capsys):
    (copied / "finished.json").write_text(content)
    assert not is_finished(arguments(folder, copied.name))
    distill(arguments(folder, copied.name))
    assert "resumed from" in capsys.readouterr().out
    assert is_finished(arguments(folder, copied.name))


def test_weights_alone_are_no_checkpoint(folder, capsys):
    distill(arguments(folder, "alone", save_only_model=True))
    assert is_finished(arguments(folder, "alone", save_only_model=True))
    said = capsys.readouterr().out
    assert "no checkpoint to train further from (save_only_model=true)" in said
    assert "raise max_steps" not in said
    with pytest.raises(ValueError, match=r"weights alone \(save_only_model=true\)"):
        distill(arguments(folder, "alone", max_steps=6))
