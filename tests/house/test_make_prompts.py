"""recipes/smollm2/make_prompts.py: whole functions and paragraphs, and no prompts out of nothing."""

import importlib.util
import json

import pytest

from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("make_prompts", ROOT / "recipes/smollm2/make_prompts.py")
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

BODY = "    value = first + second\n" * 10 + "    return value\n"
CODE = (
    f"def one(\n    first,\n    second,\n) -> int:\n{BODY}\n\nX = 1\n\n\n"
    f"def two(first, second):\n{BODY}<|endoftext|>\n"
)


def test_functions_are_whole_and_the_last_is_among_them(tmp_path):
    (tmp_path / "code.txt").write_text(CODE)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "How many?"}) + "\n")
    rows = module.make_prompts([tmp_path / "asked.jsonl"], [tmp_path / "code.txt"], [], 10, 0)
    said = {row["messages"][0]["content"] for row in rows}
    assert "How many?" in said
    functions = [text.split("\n\n", 1)[1] for text in said if "\n\n" in text]
    assert sorted(text.split("(")[0] for text in functions) == ["def one", "def two"]
    assert all(text.endswith("return value") for text in functions)


def test_nothing_to_ask_is_an_error():
    with pytest.raises(SystemExit, match="no prompts"):
        module.make_prompts([], [], [], 10, 0)
