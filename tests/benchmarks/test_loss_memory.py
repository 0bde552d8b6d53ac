"""The command that measures what the loss takes: its figures follow the chunk, not the positions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.loss_memory import loss_memory
from csdraft.trainers.objective import Objective

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

VOCAB, WIDTH = 3000, 4


def measured(chunk: int, positions: int):
    objective = Objective({"forward_kl": 1.0}, chunk=chunk)
    return loss_memory(objective, VOCAB, positions, WIDTH, torch.bfloat16, torch.device("cpu"))


def test_measured_and_forecast_stand_beside_each_other():
    small, long, large = measured(32, 128), measured(32, 512), measured(128, 128)
    for found, chunk, positions in ((small, 32, 128), (long, 32, 512), (large, 128, 128)):
        assert found.forecast == 16 * 3 * chunk * VOCAB
        assert found.whole == 16 * 3 * positions * VOCAB
        assert found.forecast / 3 < found.tensors <= found.forecast
    assert long.tensors < 1.1 * small.tensors
    assert large.tensors > 2 * small.tensors


def test_the_process_is_watched_too():
    """Large enough for the allocator to ask the system."""
    found = loss_memory(
        Objective({"forward_kl": 1.0}, chunk=64), 50_000, 128, WIDTH, torch.float32, torch.device("cpu")
    )
    assert found.resident is None or found.resident > found.forecast / 4
