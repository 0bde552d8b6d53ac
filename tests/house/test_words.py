"""Words that the project has given up are not used again: `gone_words.txt` lists them with what is written instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.source import ROOT, prose

LIST = Path(__file__).with_name("gone_words.txt")
FOLDERS = ("csdraft", "benchmarks", "examples", "scripts", "recipes", "docs", "models")


def gone_words(text: str) -> dict[str, str]:
    """Each word with what is written instead."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line and not line.startswith("#"):
            words, equals, instead = line.partition(" = ")
            assert equals, f"{LIST.name}:{number}: write `words = what to write instead`"
            assert instead.strip(), f"{LIST.name}:{number}: say what to write instead of {words}"
            found |= {word.strip(): instead.strip() for word in words.split(",")}
    return found


def found_in(text: str, words: dict[str, str]) -> list[str]:
    """What a text says that it should not, each with its neighbours and what to write."""
    faults = []
    for word, instead in words.items():
        flags = re.IGNORECASE if word.islower() else 0
        for match in re.finditer(rf"(?<![\w.`]){re.escape(word)}(?![\w(`])", text, flags):
            around = text[max(0, match.start() - 30) : match.end() + 30]
            faults.append(f"“{word}” in “…{around}…”: write {instead}")
    return faults


def read_files() -> list[Path]:
    paths = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md")
    ]
    return [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csdraft_command.py")] + paths


def test_no_file_says_a_word_that_is_gone() -> None:
    words, paths = gone_words(LIST.read_text(encoding="utf-8")), read_files()
    assert words
    assert len(paths) > 200
    faults = [f"{path.relative_to(ROOT)}: {fault}" for path in paths for fault in found_in(prose(path), words)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        '"""The hazard of it."""',
        "x = 1  # its Hazards",
        'raise ValueError(f"a hazard of {x}")',
        "x = ('of its own ' f'accord')",
        '"""Of its\n    own accord."""',
        "# of its own\n# accord",
        "y = '''Watch it'''",
    ],
)
def test_a_gone_word_is_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(text)
    words = gone_words("hazard, hazards = rate\nof its own accord = by default\nWatch = other\n")
    assert len(found_in(prose(tmp_path / "said.py"), words)) == 1


@pytest.mark.parametrize("text", ["hazard = hazards(1)", '"""Haphazardly."""', '"""Do watch."""', "# hazard_of"])
def test_what_only_resembles_a_gone_word_is_not_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(text)
    words = gone_words("hazard, hazards = rate\nWatch = other\n")
    assert not found_in(prose(tmp_path / "said.py"), words)


def test_a_word_without_a_replacement_is_refused() -> None:
    for line in ("hazard", "hazard = "):
        with pytest.raises(AssertionError, match="instead"):
            gone_words(line)
