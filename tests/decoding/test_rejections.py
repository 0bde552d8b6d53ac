"""Expected rejections: a sum of total variations that rejection sampling meets, and a worse rule does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from csdraft import MaxGram, ModelDrafter, Report
from csdraft.decoding.draft import ROOT, Draft, DraftProbs
from csdraft.decoding.interfaces import Round, Verdict
from csdraft.reports.rejections import Rejections
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.rejection import Rejection
from tests import tiny

SAMPLED = {"do_sample": True, "max_new_tokens": 120, "min_new_tokens": 120, "temperature": 0.7}
SEEDS = [3, 1, 4, 1, 5, 9]


def decoded(verifier, assistant=None, **options) -> Report:
    inputs = {key: value.repeat(len(SEEDS), 1) for key, value in tiny.prompt().items()}
    how = {"verifier": verifier, "schedule": Fixed(), "strict": True, "row_seeds": SEEDS, "diagnose": True} | options
    assistant = assistant or ModelDrafter(tiny.drafter_of("llama", scale=0.3), depth=4)
    output = tiny.tiny("llama").generate(**inputs, **SAMPLED, **how, assistant=assistant, return_dict_in_generate=True)
    return output.report


@dataclass(frozen=True)
class Equality(Rejection):
    """Draws from the target, and keeps a drafted token that happens to be the same: lossless, and worse."""

    def keeps(self, draft, node, target_probs, row, sampler):
        token = sampler.draw(row, target_probs)
        point = torch.zeros_like(target_probs)
        point[token] = 1
        return draft.child(node, token), point


def test_rejection_sampling_rejects_as_often_as_distributions_differ():
    found = decoded("rejection").rejections
    assert found.judged > 500
    assert 0.1 < found.expected / found.judged < 0.9
    assert abs(found.deviations) < 2
    assert "the drafter is the limit" in found.limit


def test_expected_rejections_of_point_masses_are_measured():
    found = decoded("rejection", MaxGram()).rejections
    assert found.judged > 100
    assert abs(found.deviations) < 3


@pytest.mark.slow
def test_a_worse_rule_rejects_more_than_the_distributions_ask_for():
    found = decoded(Equality()).rejections
    assert found.deviations > 5
    assert "the rule is the limit" in found.limit


def test_expected_rejections_are_those_counted_by_hand():
    """Two of three tokens kept: the third is judged and refused; its distribution is what it was drawn from."""
    target, other = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    draft = Draft((0, 1, 2), (ROOT, 0, 1), (1, 1, 1), (0.5, 0.5, 0.5), DraftProbs("iid", (other, None, target)))

    class View:
        def probs(self, node):
            return target

    context = type("Where", (), {"tip": ROOT})()
    found = Rejections()
    found.add([Round(context, draft, Verdict([0, 1], 1), 0, View())])
    assert (found.judged, found.measured) == (3, 1)
    assert found.expected == pytest.approx(0.3 + 0.7 + 0.0)
    found.add([Round(context, draft, Verdict([0, 1], None, True), 0, View())])  # the text ended: 2 is not judged
    assert (found.judged, found.measured) == (5, 1)
    found.add([Round(context, draft, Verdict([0, 1, 2], 1), 0, View())])  # a bonus token is no rejection
    assert (found.judged, found.measured) == (8, 1)


@pytest.mark.slow
def test_reports_keep_it_and_show_it():
    report = decoded("rejection")
    again = Report.from_dict(report.to_dict())
    assert again.rejections == report.rejections
    both = report + again
    assert both.rejections.measured == 2 * report.rejections.measured
    assert (report + Report()).rejections == report.rejections
    assert f"{report.rejections.measured:,} rejections at" in str(report)
    assert report.rejections.measured == sum(n for (kept, tried), n in report.target.outcomes.items() if tried > kept)


def test_nobody_is_asked_unless_told():
    report = decoded("rejection", diagnose=False)
    assert report.rejections is None
    assert "expected" not in str(report)


@pytest.mark.parametrize("options", [{"verifier": "match"}, {"verifier": "rejection", "do_sample": False}])
def test_draws_without_distributions_are_refused(options):
    with pytest.raises(ValueError, match="diagnose=True compares distributions"):
        tiny.tiny("llama").generate(
            **tiny.prompt(), **{"do_sample": True} | options, max_new_tokens=3, assistant=MaxGram(), diagnose=True
        )
