"""`python -m benchmarks gpu`, in small and on a CPU."""

import json
import re

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel


def test_rows_are_measured_beside_transformers(tmp_path, capsys) -> None:
    rows = ["transformers", "plain", "drafter, 5 tokens", "cascade", "transformers, 8 rows", "drafter, 8 rows"]
    size = ["--size", "tiny", "--device", "cpu", "--dtype", "float32", "--new", "12"]
    gpu.main([*size, "--out", str(tmp_path / "gpu.json"), "--only", *rows])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == rows
    assert found["plain"]["per_round"] == 1.0
    assert found["drafter, 5 tokens"]["per_round"] > 1.5  # the drafter is right more often than not
    printed = capsys.readouterr().out
    assert re.match(r"[\d.]+ [kM] parameters in float32 on cpu", printed)
    assert all(f"| {row} |" in printed for row in rows)
