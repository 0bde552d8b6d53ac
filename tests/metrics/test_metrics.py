"""Metrics: what the numbers mean, and that `evaluate` loads them by path."""

from pathlib import Path

import numpy as np
import pytest
import torch

from csdraft.losses.total_variation import total_variation
from csdraft.metrics.measures import (
    by_position,
    expected_acceptance,
    greedy_agreement,
    tokens_per_call,
)
from csdraft.reports.report import Report
from tests.tiny import fresh, noisy, prompt

DRAFT_PROBS = torch.tensor([0.20, 0.45, 0.05, 0.25, 0.05])
TARGET_PROBS = torch.tensor([0.42, 0.23, 0.17, 0.11, 0.07])


def test_expected_acceptance_of_known_distributions():
    assert expected_acceptance(DRAFT_PROBS.log(), TARGET_PROBS.log()).item() == pytest.approx(0.64)
    assert not greedy_agreement(DRAFT_PROBS.log(), TARGET_PROBS.log())


def test_expected_acceptance_is_how_often_rejection_sampling_accepts():
    rng = np.random.default_rng(0)
    drafted = rng.choice(5, size=40_000, p=DRAFT_PROBS.double().numpy() / DRAFT_PROBS.double().sum().item())
    ratio = (TARGET_PROBS / DRAFT_PROBS).numpy()[drafted]
    accepted = (rng.random(len(drafted)) < ratio).mean()
    assert expected_acceptance(DRAFT_PROBS.log(), TARGET_PROBS.log()).item() == pytest.approx(accepted, abs=0.01)


def test_expected_acceptance_is_one_less_the_total_variation():
    draft, target = 3 * torch.randn(2, 7, 11), 3 * torch.randn(2, 7, 11)
    variation = total_variation(draft.flatten(0, 1), target.flatten(0, 1), torch.zeros(14, dtype=torch.long))
    torch.testing.assert_close(expected_acceptance(draft, target), 1 - variation.view(2, 7))


def test_equal_models_agree_everywhere():
    logits = torch.randn(6, 11)
    torch.testing.assert_close(expected_acceptance(logits, logits + 3), torch.ones(6))
    assert greedy_agreement(logits, logits + 3).all()


def test_a_high_temperature_makes_any_two_alike_and_a_low_one_tells_their_choices_apart():
    draft, target = torch.randn(2, 500, 11)
    assert expected_acceptance(draft, target, 100.0).min() > 0.98
    cold = expected_acceptance(draft, target, 1e-4)
    torch.testing.assert_close(cold, greedy_agreement(draft, target).float(), atol=1e-3, rtol=0)


def test_the_wider_vocabulary_is_cut():
    draft, target = torch.randn(4, 11), torch.randn(4, 16)
    torch.testing.assert_close(expected_acceptance(draft, target), expected_acceptance(draft, target[:, :11]))
    assert torch.equal(greedy_agreement(draft, target), greedy_agreement(draft, target[:, :11]))


def test_means_are_taken_by_position():
    values, positions = torch.tensor([True, False, True, True]), torch.tensor([2, 2, 1, 5])
    assert by_position(values, positions) == {1: 1.0, 2: 0.5, 5: 1.0}


def test_block_efficiency_is_over_all_texts_together():
    assert tokens_per_call([10, 2], [2, 2]) == 3.0
    assert tokens_per_call([], []) == 0.0


def test_block_efficiency_of_a_report():
    target = fresh("llama")
    output = target.generate(
        **prompt(), assistant=noisy(target), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    report = output.report
    assert isinstance(report, Report)
    assert tokens_per_call([report.emitted], [report.rounds]) == report.block_efficiency > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_acceptance(torch.zeros(3), torch.zeros(3), 0), "temperature=0 .* greedy_agreement"),
        (lambda: by_position(torch.zeros(3), torch.zeros(2)), "3 values and 2 positions"),
        (lambda: tokens_per_call([1], [1, 2]), "1 texts and calls of 2"),
        (lambda: tokens_per_call([-1], [1]), "below 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def load(root: Path, tmp_path_factory: pytest.TempPathFactory):
    """`evaluate.load` of a file of csdraft/metrics, its caches in a folder of this test's own."""
    evaluate = pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        yield lambda name: evaluate.load(str(root / "csdraft/metrics" / name), cache_dir=str(folder))


def test_evaluate_loads_acceptance(load):
    draft, target = torch.randn(4, 11), torch.randn(4, 11)
    draft[:, 9:] = target[:, 9:] = float("-inf")
    positions = [1, 2, 1, 2]
    metric = load("acceptance.py")
    metric.add_batch(predictions=draft[:3], references=target[:3])
    metric.add_batch(predictions=draft[3:], references=target[3:])
    figures = metric.compute(temperature=0.7, positions=positions)
    expected, agreed = expected_acceptance(draft, target, 0.7), greedy_agreement(draft, target)
    assert figures["acceptance"] == pytest.approx(expected.mean().item())
    assert figures["agreement"] == pytest.approx(agreed.float().mean().item())
    assert figures["acceptance_by_position"] == pytest.approx(by_position(expected, torch.tensor(positions)))
    assert figures["agreement_by_position"] == pytest.approx(by_position(agreed, torch.tensor(positions)))
    assert set(metric.compute(predictions=draft, references=target)) == {"acceptance", "agreement"}


def test_evaluate_loads_block_efficiency(load):
    figures = load("block_efficiency.py").compute(predictions=[64, 32], references=[20, 12])
    assert figures == {"block_efficiency": 3.0}
