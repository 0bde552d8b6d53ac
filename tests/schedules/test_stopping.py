"""Schedules that stop a draft: what they are asked, when they say so, and how a head is trained to."""

from __future__ import annotations

import math
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import csdraft
from csdraft import MaxGram, ModelDrafter, spec
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule, Verdict
from csdraft.schedules.confidence import Confidence
from csdraft.schedules.entropy import Entropy
from csdraft.schedules.fixed import Fixed
from csdraft.schedules.stop_head import StopHead
from csdraft.tables.acceptance_head import AcceptanceHead
from csdraft.trainers.stop_head import Examples, fit, harvest, judge
from tests import tiny

DEPTH = 6
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_stop_head.py"
WANTED = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}


class Asked(Schedule):
    """Passes budgets on, and notes every question and answer of their stops, a list a draft."""

    def __init__(self, inner: Schedule):
        self.inner, self.drafts = inner, []

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        return [self._noted(budget) for budget in self.inner.budgets(contexts, rooms, drafter)]

    def _noted(self, budget: Budget) -> Budget:
        said: list[tuple[float, float, bool]] = []
        self.drafts.append(said)

        def stop(confidence, entropy):
            said.append((confidence, entropy(), bool(budget.stop and budget.stop(confidence, entropy))))
            return said[-1][2]

        return replace(budget, stop=stop)

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self.inner.observe(rounds, draft_seconds, score_seconds)


def asked(schedule: Schedule, drafter: Drafter | None = None, **options) -> tuple[list, csdraft.Report]:
    watched = Asked(schedule)
    drafter = drafter or ModelDrafter(tiny.drafter_of("llama", scale=0.2))
    how = {"schedule": watched, "strict": True, "return_dict_in_generate": True, "assistant": drafter}
    report = tiny.tiny("llama").generate(**tiny.prompt(), **WANTED | options, **how).report
    return [said for said in watched.drafts if said], report


def small_distribution(text: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = tiny.drafter_of("llama", scale=0.2)(torch.tensor([text])).logits[0, -1]
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.6, "row_seeds": [4]}])
@pytest.mark.parametrize("vertical", [False, True])
def test_a_stop_hears_the_confidence_and_entropy_of_every_kept_token(options, vertical):
    small = tiny.drafter_of("llama", scale=0.2)
    drafter = csdraft.Vertical(small, MaxGram(depth=2)) if vertical else ModelDrafter(small)
    drafts, report = asked(Fixed(3), drafter, **options)
    distribution = small_distribution(tiny.prompt()["input_ids"][0].tolist(), options.get("temperature", 1.0))
    confidence, entropy, _ = drafts[0][0]
    assert any(confidence == pytest.approx(float(p), abs=1e-5) for p in distribution)
    assert entropy == pytest.approx(float(-(distribution * distribution.log()).sum()), abs=1e-4)
    assert sum(map(len, drafts)) == report.target.drafted.total(), "the last token of a draft too"


def test_entropy_ends_a_draft_where_the_bound_falls_under_the_threshold():
    drafts, _ = asked(Entropy(gamma=0.1, threshold=0.5, depth=DEPTH))
    bounds = [[1 - math.sqrt(0.1 * entropy) for _, entropy, _ in said] for said in drafts]
    assert all(bound >= 0.5 for draft in bounds for bound in draft[:-1])
    ended_early = [draft for draft in bounds[:-3] if len(draft) < DEPTH]
    assert len(ended_early) > 3
    assert all(draft[-1] < 0.5 for draft in ended_early)
    assert any(len(draft) > 1 for draft in bounds)


def test_entropy_is_not_asked_for_where_nobody_wants_it():
    (budget,) = Confidence(0.5).budgets([None], [9], None)
    assert budget.stop(0.4, lambda: pytest.fail("computed")) is True


def a_round(row: int, drafted: int, accepted: int) -> Round:
    context = Context(row, None, None)
    return Round(context, Draft.chain(range(drafted)), Verdict(list(range(accepted)), 1), 0, None)


def test_the_threshold_follows_the_acceptance_rate_row_by_row():
    options = Entropy(threshold=0.4, rate=0.5)
    working = options.start(None, None)
    contexts = [Context(row, None, None) for row in (0, 1)]

    def stops(entropy):
        return [b.stop(0.5, lambda: entropy) for b in working.budgets(contexts, [9, 9], None)]

    between = 5 * (1 - 0.4) ** 2  # the entropy at which the bound is just the threshold
    for _ in range(20):
        working.observe([a_round(0, 4, 0), a_round(1, 4, 4)], 0.1, 0.1)
    assert stops(between + 0.02) == [True, False]
    assert stops(between - 0.02) == [True, False]
    assert working.thresholds[0] == pytest.approx(0.4 + 20 * 0.1 * 0.01)
    assert options.start(None, None).budgets(contexts, [9, 9], None)[0].stop(0.5, lambda: between - 0.02) is False


def test_without_a_head_confidences_multiply():
    (budget,) = StopHead(threshold=0.7).budgets([None], [9], None)
    assert [budget.stop(p, lambda: 0.0) for p in (0.8, 0.7, 0.6, 0.5)] == [False, False, False, True]
    (budget,) = StopHead(threshold=0.7).budgets([None], [9], None)
    assert budget.stop(0.8, lambda: 0.0) is False, "every draft starts again at 1"


def test_a_head_is_asked_with_entropy_and_depth():
    head = fit(examples(2000))
    drafts, _ = asked(StopHead(head, threshold=0.6, depth=DEPTH))
    for said in drafts:
        alive = 1.0
        for depth, (confidence, entropy, stopped) in enumerate(said):
            alive *= head(confidence, entropy, depth)
            assert stopped == (1 - alive > 0.6)
    assert sum(said[-1][2] for said in drafts) > 3


# Training.


def examples(count: int, seed: int = 0) -> Examples:
    """Tokens that are kept by entropy and depth, whatever their confidence says."""
    rng = np.random.default_rng(seed)
    confidence, entropy, depth = rng.uniform(0.05, 1, count), rng.uniform(0, 4, count), rng.integers(0, 8, count)
    chance = 1 / (1 + np.exp(1.5 * entropy + 0.2 * depth - 3))
    return Examples(np.stack([confidence, entropy, depth], 1), rng.uniform(size=count) < chance)


def test_a_head_learns_what_confidence_does_not_say():
    head, unseen = fit(examples(4000)), examples(2000, seed=1)
    learned, baseline = judge(head, unseen), judge(None, unseen)
    assert learned["cross_entropy"] < 0.45 < 0.8 < baseline["cross_entropy"]
    assert learned["calibration_error"] < 0.05 < baseline["calibration_error"]
    assert head(0.9, 0.2, 0) > 0.8 > 0.2 > head(0.9, 3.8, 0)


def test_weighing_rejections_more_predicts_less():
    plain, careful = fit(examples(2000)), fit(examples(2000), rejected_weight=6.0)
    assert careful(0.5, 2.0, 1) < plain(0.5, 2.0, 1) - 0.1


def test_too_little_to_learn_from_is_said():
    few = examples(2000)
    with pytest.raises(ValueError, match="harvest more texts"):
        fit(few.split(0.01)[0])
    with pytest.raises(ValueError, match="some kept and some not"):
        fit(Examples(few.heard, np.ones(len(few), dtype=bool)))


@pytest.mark.parametrize("tail", [False, True])
def test_harvested_labels_are_the_verdicts(tail):
    model = ModelDrafter(tiny.drafter_of("llama", scale=0.2))
    drafter = csdraft.Horizontal((model, MaxGram()), (3, 5)) if tail else model
    inputs = tiny.inputs_of("llama", 3)
    found = harvest(tiny.tiny("llama"), drafter, [inputs], depth=DEPTH, **WANTED)
    how = {"schedule": Fixed(DEPTH), "return_dict_in_generate": True}
    tally = tiny.tiny("llama").generate(**inputs, **WANTED, assistant=drafter, **how).report.target
    name = next(iter(tally.drafted)) if tail else None
    tried, kept = (c[name] if tail else c.total() for c in (tally.tried, tally.accepted))
    assert (len(found), int(found.kept.sum())) == (tried, kept)
    assert 0 < kept < tried
    assert set(found.heard[:, 2]) <= set(range(3 if tail else DEPTH))


@pytest.mark.slow
@pytest.mark.slow
def test_the_script_trains_a_head_that_the_schedule_takes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "head.safetensors"
    words = "--target models/smol-target --drafter models/smol-drafter --prompts recipes/smol/prompts_tune.jsonl"
    words += f" --limit 4 --max-new-tokens 48 --out {path}"
    monkeypatch.chdir(SCRIPT.parent.parent)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *words.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert f"{path}: from " in said
    head = StopHead(path).head
    assert head(0.95, 0.3, 0) > head(0.3, 2.5, 0)
    judged = [float(line.split()[-2]) for line in said.splitlines()[-2:]]
    assert all(0 < entropy < 2 for entropy in judged)
    assert judged[0] != judged[1]


# Saving.


def test_a_head_is_saved_and_named_in_json(tmp_path):
    head = fit(examples(500))
    head.save(tmp_path / "head.safetensors")
    again = StopHead(tmp_path / "head.safetensors")
    assert again.head == head
    assert again.head(0.3, 1.0, 2) == head(0.3, 1.0, 2)
    tables: dict = {}
    document = spec.to_json(StopHead(head), spec.Names({}, tables))
    assert spec.from_json("schedules", document, spec.Names({}, tables)).head is head
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"csdraft\.trainers\.stop_head"):
        AcceptanceHead.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy(gamma=0), "gamma=0"),
        (lambda: Entropy(rate=2.0), r"rate=2\.0"),
        (lambda: Entropy(depth=0), "depth=0"),
        (lambda: StopHead(threshold=1.5), r"threshold=1\.5"),
        (lambda: StopHead(depth=0), "depth=0"),
        (lambda: AcceptanceHead(*[np.zeros(2)] * 6), "shapes"),
    ],
)
def test_senseless_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
