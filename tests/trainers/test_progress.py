"""The progress bar of a training: every step with its own loss and speed, and the last evaluation."""

from __future__ import annotations

import re

import pytest

from csdraft.trainers.run import distill
from tests.trainers.pair import arguments, make_pair


def test_each_step_is_shown_with_its_own_loss(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("csdraft.trainers.progress.PAUSE", 0.0)
    folder = make_pair(tmp_path)
    shown = {
        "disable_tqdm": False, "max_steps": 6, "logging_steps": 3, "eval_prompts": f"{folder}/prompts.jsonl",
        "eval_strategy": "steps", "eval_steps": 3, "eval_new_tokens": 4,
    }  # fmt: skip
    trainer = distill(arguments(folder, "shown", **shown))
    lines = re.split(r"[\r\n]", capfd.readouterr().err)
    found = {int(match[1]): float(match[2]) for line in lines if (match := re.search(r"(\d)/6 .*loss ([\d.]+)", line))}
    assert list(found) == [1, 2, 3, 4, 5, 6]
    losses = list(found.values())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [sum(losses[:3]) / 3, sum(losses[3:]) / 3] == pytest.approx(logged, abs=1e-3)
    assert len(set(losses)) == 6
    assert any(
        re.search(r"6/6 .*[\d,]+ tokens/s, .*expected acceptance .*, block efficiency ", line) for line in lines
    )
    assert "nan" not in "".join(lines)


def test_a_file_gets_few_lines(tmp_path, capfd):
    """Found in a log of the demo: two lines a step, and the bar of an evaluation between them."""
    folder = make_pair(tmp_path)
    evaluated = {"eval_prompts": f"{folder}/prompts.jsonl", "eval_strategy": "steps", "eval_steps": 3}
    distill(arguments(folder, "shown", disable_tqdm=False, max_steps=6, eval_new_tokens=4, **evaluated))
    lines = [line for line in re.split(r"[\r\n]", capfd.readouterr().err) if "/6 " in line]
    assert len(lines) < 6
    assert "loss" in lines[-1]
