"""A count below 1 is refused by every benchmark before it loads a model, since it would measure nothing."""

import pytest

from benchmarks.__main__ import main
from examples import demo_chat

COUNTS = {
    "suites": "--limit", "lookup": "--proposals", "memory": "--positions", "methods": "--limit", "training": "--steps",
    "verifiers": "--pairs", "never-loses": "--count", "tasks": "--count", "replay": "--limit", "gpu": "--new",
    "forwards": "--passes",
}  # fmt: skip
"""Command -> its option for how much is measured."""


@pytest.mark.parametrize("command", COUNTS)
def test_a_count_of_nothing_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        main([command, COUNTS[command], "0"])
    assert f"argument {COUNTS[command]}" in capsys.readouterr().err


def test_the_chat_demo_asks_at_least_one_question(capsys):
    with pytest.raises(SystemExit):
        demo_chat.main(["--count", "0"])
    assert "argument --count" in capsys.readouterr().err
