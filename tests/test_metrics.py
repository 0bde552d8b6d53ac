"""The metrics: what they say of distributions one can work out, by themselves and through `evaluate.load`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import VOCAB, drafter_of, prompt, tiny

from csdraft import ModelDrafter
from csdraft.metrics.acceptance import by_position, expected_acceptance, greedy_agreement
from csdraft.metrics.block_efficiency import block_efficiency


def logs(*rows):
    return torch.tensor(rows).log()


def test_expected_acceptance_is_the_shared_probability():
    student, target = logs([0.2, 0.45, 0.05, 0.25, 0.05]), logs([0.42, 0.23, 0.17, 0.11, 0.07])
    assert expected_acceptance(student, target).item() == pytest.approx(0.64)
    assert expected_acceptance(target, target).item() == pytest.approx(1)
    assert expected_acceptance(logs([1.0, 0]), logs([0, 1.0])).item() == 0


def test_temperature_flattens_both():
    student, target = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    cold, warm = (expected_acceptance(student, target, temperature) for temperature in (0.01, 100))
    assert torch.allclose(cold, greedy_agreement(student, target), atol=1e-3)
    assert (warm > 0.9).all()
    with pytest.raises(ValueError, match="greedy_agreement"):
        expected_acceptance(student, target, 0)


def test_a_padded_vocabulary_is_cut():
    student = torch.randn(3, 10)
    padded = torch.cat([student, torch.full((3, 6), 50.0)], 1)
    assert torch.allclose(expected_acceptance(student, padded), torch.ones(3))
    assert torch.allclose(expected_acceptance(padded, student), torch.ones(3))


def test_positions_are_averaged_over_the_texts_that_reach_them():
    assert by_position([[1.0, 0.0, 0.5], [0.0], [0.5, 1.0]]) == [0.5, 0.5, 0.5]
    assert by_position([]) == []


def test_block_efficiency_of_a_report_and_of_counts():
    output = tiny("llama").generate(
        **prompt(), assistant=ModelDrafter(drafter_of("llama")), max_new_tokens=24, return_dict_in_generate=True
    )
    report = output.report
    assert 1 < block_efficiency(report) == report.block_efficiency == block_efficiency(report.emitted, report.rounds)
    assert block_efficiency([3, 9], [2, 4]) == 2
    with pytest.raises(ValueError, match="nothing was decoded"):
        block_efficiency(0, 0)


@pytest.fixture(scope="module")
def load(tmp_path_factory, root):
    """`evaluate.load` of one of our files; what it writes stays in the tests' folder."""
    evaluate = pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield lambda name: evaluate.load(str(root / "csdraft" / "metrics" / f"{name}.py"), cache_dir=str(folder))


def test_evaluate_loads_acceptance(load):
    metric = load("acceptance")
    lengths = [4, 2, 5]
    students, targets = ([torch.randn(n, VOCAB) for n in lengths] for _ in range(2))
    targets[1] = students[1]
    result = metric.compute(predictions=students, references=targets, temperature=0.7)
    student, target = torch.cat(students), torch.cat(targets)
    expected = expected_acceptance(student, target, 0.7)
    assert result["acceptance"] == pytest.approx(expected.mean().item())
    assert result["agreement"] == pytest.approx(greedy_agreement(student, target).mean().item())
    assert len(result["acceptance_by_position"]) == len(result["agreement_by_position"]) == 5
    assert result["acceptance_by_position"][4] == pytest.approx(expected[-1].item())


def test_evaluate_loads_block_efficiency(load):
    metric = load("block_efficiency")
    metric.add_batch(predictions=[3, 9], references=[2, 4])
    metric.add(prediction=np.int64(6), reference=3)
    assert metric.compute() == {"block_efficiency": 2.0}


def test_the_functions_do_without_evaluate():
    code = "import sys; sys.modules['evaluate'] = sys.modules['datasets'] = None; del sys.modules['evaluate']\n"
    code += "import csdraft.metrics.acceptance, csdraft.metrics.block_efficiency; assert 'evaluate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
