"""The bigram table: counted right, kept unchanged, built by its script."""

from __future__ import annotations

import random
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from csdraft.tables.bigram import BigramTable

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_bigrams.py"


def reference(documents: list[list[int]], vocab: int) -> tuple[list[int], list[int]]:
    pairs = [pair for document in documents for pair in pairwise(document)]
    times = [[pairs.count((first, second)) for second in range(vocab)] for first in range(vocab)]
    return [row.index(max(row)) if any(row) else -1 for row in times], [max(row) for row in times]


def test_the_most_frequent_successor() -> None:
    generator = random.Random(0)
    for _ in range(90):
        vocab = generator.randint(1, 9)
        documents = [
            [generator.randrange(vocab) for _ in range(generator.randint(0, 20))]
            for _ in range(generator.randint(0, 12))
        ]
        table = BigramTable.build(documents, vocab)
        assert (table.successor.tolist(), table.count.tolist()) == reference(documents, vocab)
        tensors = BigramTable.build([torch.tensor(document, dtype=torch.long) for document in documents], vocab)
        assert tensors.successor.tolist() == table.successor.tolist()


def test_a_chain_of_successors() -> None:
    table = BigramTable.build([[1, 2, 3], [5, 6, 5]], 8)
    assert table.after(1, 10) == [2, 3]
    assert table.after(1, 1) == [2]
    assert table.after(1, 0) == []
    assert table.after(5, 4) == [6, 5, 6, 5]
    assert table.after(4, 10) == []
    assert table.after(1000, 10) == []  # a padded vocabulary has rows that no tokenizer knows
    assert all(type(token) is int for token in table.after(5, 4))


def test_saved_and_loaded(tmp_path: Path) -> None:
    table = BigramTable.build([[1, 2, 3, 1]], 8)
    table.save(tmp_path / "new" / "table.safetensors")
    loaded = BigramTable.load(tmp_path / "new" / "table.safetensors")
    assert loaded == table
    assert hash(loaded) == hash(table)
    assert loaded != BigramTable.build([[1, 2, 3]], 8)
    assert len(loaded) == 8


def test_nobody_can_change_it() -> None:
    values = np.array([1, -1])
    table = BigramTable(values, np.array([3, 0]))
    values[0] = 0
    assert table.after(0, 1) == [1]
    with pytest.raises(ValueError, match="read-only"):
        table.successor[0] = 0
    with pytest.raises(AttributeError):
        table.successor = values  # type: ignore[misc]


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below 2"):
        BigramTable(np.array([2, 0]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"both must be \(vocab,\)"):
        BigramTable(np.array([1, 0]), np.array([1]))
    with pytest.raises(ValueError, match="vocabulary of 3"):
        BigramTable.build([[1, 3]], 3)
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has format None.*build_bigrams\.py"):
        BigramTable.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ValueError, match="not a safetensors file"):
        BigramTable.load(tmp_path / "text")


def test_the_script_builds_a_table_that_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.txt").write_text("a b a b a c")
    (tmp_path / "docs" / "two.md").write_text("b c")
    (tmp_path / "more.txt").write_text("c d\n<|endoftext|>\nc d")
    arguments = ["--tokenizer", tmp_path / "tokenizer", "--text", tmp_path / "docs", tmp_path / "more.txt"]
    arguments += ["--out", tmp_path / "table.safetensors"]
    monkeypatch.setattr(sys, "argv", ["build_bigrams.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "3 of 5 tokens have a successor, from 4 documents" in capsys.readouterr().out
    table = BigramTable.load(tmp_path / "table.safetensors")
    assert table.successor.tolist() == [-1, 2, 1, 4, -1]
    assert table.count.tolist() == [0, 2, 2, 2, 0]
