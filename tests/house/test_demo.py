"""The demo on a tiny pair: a drafter before and after distilling, and no lines on the screen but its own."""

from __future__ import annotations

import logging
import re

import datasets
import pytest

from examples import demo, demo_distill
from tests.trainers.pair import make_pair

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel


@pytest.fixture
def screen_of_others():
    """What the demo switches off for itself is on again afterwards."""
    yield
    datasets.enable_progress_bars()
    logging.getLogger("DeepSpeed").filters.clear()


def test_it_says_what_distilling_gained(tmp_path, monkeypatch, capsys, screen_of_others):
    folder = make_pair(tmp_path)
    for name, value in {"CORPUS": str(folder / "corpus"), "STEPS": 8, "ROWS": 4, "LENGTH": 64}.items():
        monkeypatch.setattr(demo_distill, name, value)
    (folder / "held_out.jsonl").write_text((folder / "prompts.jsonl").read_text().splitlines()[0])
    monkeypatch.setattr(demo, "TUNE_PROMPTS", str(folder / "held_out.jsonl"))
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    names = ["--target", str(folder / "target"), "--drafter", str(folder / "student")]
    names += ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "out")]
    assert demo.main([*names, "--layers", "0", "2", "--max-new-tokens", "8", "--count", "1", "--threads", "1"]) == 0
    screen = capsys.readouterr()
    rows = {
        when: float(re.search(rf"own drafter {when} distilling .*x +([\d.]+) ", screen.out)[1])
        for when in ("before", "after")
    }
    said = re.search(
        r"drafting 3 tokens a round, .* gave ([\d.]+) tokens a round before and ([\d.]+) after", screen.out
    )
    assert [float(number) for number in said.groups()] == list(rows.values())
    assert "block efficiency" in screen.err
    assert "LlamaForCausalLM" not in screen.out
    assert "examples/s" not in screen.out + screen.err
