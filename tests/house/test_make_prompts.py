"""recipes/smollm2/make_prompts.py: whole functions and paragraphs, and no prompts out of nothing."""

import importlib.util
import json

import pytest
import torch
from trainers.pair import make_pair
from transformers import AutoTokenizer

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


class Writes:
    """A target that writes the same texts each time, and ends all but the last."""

    def __init__(self, words, *texts):
        ids = words(list(texts), add_special_tokens=False).input_ids
        length = 1 + max(len(row) for row in ids)
        self.rows = [row + [words.eos_token_id] * (length - len(row)) for row in ids]
        self.rows[-1] = self.rows[-1][:1] * length
        self.words = words

    def generate(self, input_ids, attention_mask, eos_token_id, max_new_tokens, **options):
        assert (eos_token_id, max_new_tokens) == (self.words.eos_token_id, module.LONGEST)
        assert attention_mask[:, -1].all()  # padded on the left
        for row in input_ids:
            asked = self.words.decode(row, skip_special_tokens=True)
            assert asked.startswith("asks: ")
            assert asked.removeprefix("asks: ") in module.STARTS
        return torch.cat([input_ids, torch.tensor(self.rows)[torch.arange(len(input_ids)) % len(self.rows)]], 1)


def test_own_prompts_differ_and_are_written_to_their_end(tmp_path, monkeypatch):
    folder = make_pair(tmp_path) / "target"
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = "{% for message in messages %}asks: {{ message.content }}{{ eos_token }}{% endfor %}"
    words.save_pretrained(folder)
    target = Writes(words, " is a long question, is it not?", "?", " " * 40, " never comes to an end")
    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: target)
    found = module.own(str(folder), 8, seed=0, rows=64)
    assert len(set(found)) == 8
    assert all(any(text.startswith(start) for start in module.STARTS) for text in found)
    assert all(text == text.strip() and len(text) >= module.SHORTEST and "never" not in text for text in found)
    assert any(text.endswith("question, is it not?") for text in found)
    with pytest.raises(SystemExit, match=r"none more in 64 tries; --own=400"):
        module.own(str(folder), 400, seed=0, rows=64)
    assert {row["messages"][0]["content"] for row in module.make_prompts([], [], [], 0, 0, own=found)} == set(found)
