"""`csdraft generate --chat` without a prompt: turns from a scripted input, answers, figures, and reuse."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import csdraft
from csdraft.cli import main
from csdraft.reports.report import Report
from tests.tiny import drafter_of, tiny, tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ 'U' if message.role == 'user' else 'A' }}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)
ESCAPE = re.compile(r"\x1b\[\d+m")
FIGURES = re.compile(r"\[(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) tokens a round; (\d+) of (\d+) prompt tokens reused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, model in (("target", tiny("llama")), ("small", drafter_of("llama"))):
        model.save_pretrained(path / name)
        made = tokenizer()
        made.chat_template = TEMPLATE
        made.save_pretrained(path / name)
    return path


def chat(folder, monkeypatch, capsys, lines: list[str], *more: str) -> tuple[list[str], str]:
    """The answers, and what the standard error said."""
    csdraft.release()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["generate", "--target", str(folder / "target"), "--chat", "--max-new-tokens", "12", *more]) == 0
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


def plainly(conversation: str) -> str:
    inputs = tokenizer()(conversation, return_tensors="pt")
    new = tiny("llama").generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return tokenizer().decode(new, skip_special_tokens=True)


def test_without_a_template_the_option_is_named(folder, tmp_path, monkeypatch, capsys):
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("thequick\n"))
    asked = ["generate", "--target", str(folder / "target"), "--tokenizer", str(tmp_path), "--chat"]
    assert main(asked) == 2
    assert "no chat template; give one (--chat-template FILE" in capsys.readouterr().err


def test_answers_are_plain_generates_and_the_conversation_is_not_read_again(folder, monkeypatch, capsys):
    lines = ["thequickbrownfox", "", "jumps"]
    answers, err = chat(folder, monkeypatch, capsys, lines, "--drafter", str(folder / "small"))
    first = plainly("UthequickbrownfoxA")
    assert answers == [first, plainly(f"UthequickbrownfoxA{first}UjumpsA")]
    (one, two) = FIGURES.findall(err)
    assert (one[2], one[3]) == ("0", "18")
    assert int(two[3]) == 18 + len(first) + 7
    assert 18 < int(two[2]) <= 18 + len(first)
    assert float(one[1]) >= 1


def test_reset_forgets_and_quit_leaves(folder, monkeypatch, capsys):
    lines = ["thequick", "/reset", "brownfox", "/what", "/quit", "jumps"]
    answers, err = chat(folder, monkeypatch, capsys, lines)
    assert answers == [plainly("UthequickA"), plainly("UbrownfoxA")]
    assert "drafting with assistant" in err
    assert "/what is not a command" in err
    assert [figures[3] for figures in FIGURES.findall(err)] == ["10", "10"]


def test_a_chat_is_coloured_and_reported(folder, monkeypatch, capsys, tmp_path):
    more = ["--drafter", str(folder / "target"), "--schedule", "fixed", "--color"]
    saved = tmp_path / "report.json"
    answers, err = chat(folder, monkeypatch, capsys, ["thequick"], *more, "--save-report", str(saved), "--report")
    assert [ESCAPE.sub("", answer) for answer in answers] == [plainly("UthequickA")]
    assert "\x1b[36m" in answers[0]
    assert "(cyan)" in err
    assert "block efficiency" in err
    assert Report.load(saved).calls == 1


def test_a_conversation_that_is_too_long_is_said(folder, monkeypatch, capsys):
    answers, err = chat(folder, monkeypatch, capsys, ["a" * 250, "thequick"])
    assert "the conversation has 252 tokens" in err
    assert answers == [plainly("UthequickA")]


def test_a_line_that_is_not_utf_8_is_said(folder, monkeypatch, capsys):
    answers, err = chat(folder, monkeypatch, capsys, ["caf\udce9", "thequick"])
    assert "the line is not UTF-8 text" in err
    assert answers == [plainly("UthequickA")]


def test_control_c_at_the_prompt_leaves_and_keeps_the_report(folder, monkeypatch, tmp_path):
    def typed() -> Iterator[str]:
        yield "thequick\n"
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, readline=typed().__next__))
    asked = ["generate", "--target", str(folder / "target"), "--chat", "--max-new-tokens", "12"]
    assert main([*asked, "--save-report", str(tmp_path / "report.json")]) == 0
    assert Report.load(tmp_path / "report.json").calls == 1


def test_with_a_prompt_chat_is_one_turn(folder, monkeypatch, capsys):
    assert chat(folder, monkeypatch, capsys, [], "--prompt", "thequick")[0] == [plainly("UthequickA")]
