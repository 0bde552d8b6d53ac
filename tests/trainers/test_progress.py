"""The line while training: every step with its own loss, speed and memory, and a last line that comes once."""

from __future__ import annotations

import re

import pytest

from csdraft import progress
from csdraft.trainers.run import distill
from tests.trainers.pair import arguments, make_pair


def test_each_step_is_shown_with_its_own_loss_and_the_last_line_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "PAUSE", 0.0)  # a file would get a line every ten seconds
    folder = make_pair(tmp_path)
    shown = {
        "disable_tqdm": False, "max_steps": 6, "logging_steps": 3, "eval_prompts": f"{folder}/prompts.jsonl",
        "eval_strategy": "steps", "eval_steps": 3, "eval_new_tokens": 4,
    }  # fmt: skip
    trainer = distill(arguments(folder, "shown", **shown))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    first = {int(re.match(r"step (\d+)", line)[1]): line for line in lines[::-1]}
    assert list(first) == [6, 5, 4, 3, 2, 1]
    losses = [
        float(re.search(r"loss ([\d.]+), [\d,]+ tokens/s, [\d.]+ s a step, [\d.]+ [MG]B", first[n])[1]) for n in first
    ]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [sum(losses[3:]) / 3, sum(losses[:3]) / 3] == pytest.approx(logged, abs=1e-3)
    assert len(set(losses)) == 6
    assert [line for line in lines if line.endswith("100%")] == [lines[-1]]
    assert "block efficiency" in lines[-1]


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left(monkeypatch, capsys):
    """Of a run that was resumed half way, what was done before took no time now."""
    clock = [0.0]
    monkeypatch.setattr("csdraft.progress.time.monotonic", lambda: clock[0])
    line = progress.Progress()
    line.restart(0.5)
    clock[0] = 20.0
    line("training", 0.75)
    assert "training: 75%, about 20 s left" in capsys.readouterr().err
