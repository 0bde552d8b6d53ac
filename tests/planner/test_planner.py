"""Theory and planner: formulas against simulation and the paper's cases, replays against real decoding."""

import itertools
import math
import random
import re
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model

from csdraft import CascadeDrafter, MaxGram, ModelDrafter, Report, bench
from csdraft import tune as tuning
from csdraft.bench import Cell, Method, Result, Setup
from csdraft.cli.tune import how_sure
from csdraft.planner.expect import expect
from csdraft.planner.search import cleaned, search
from csdraft.planner.theory import Stage, expected_round, improvement, mean
from csdraft.planner.trace import Costs, Measured, Proposal, Trace, measure_drafters
from csdraft.trees.best_first import BestFirst
from csdraft.tune import Allowance, Candidate, affordable, affordable_length, ranked, timed
from tests import tiny


def tail(acceptance: float, length: int, cost: float = 0.0) -> Stage:
    return Stage(acceptance, length, cost, proposes=True)


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        # Speculative decoding: (1 - a^(k+1)) / ((1 - a) (1 + c k)), corollary 4.2
        ([Stage(0.6, 4, 0.05)], (1 - 0.6**5) / (0.4 * 1.2)),
        ([Stage(0.9, 10, 0.1)], (1 - 0.9**11) / (0.1 * 2)),
        # Horizontal: sum of products over 1 + costs, theorem 4.5
        ([Stage(0.8, 1, 0.05), Stage(0.5, 2, 0.01)], (1 + 0.8 + 0.4 + 0.2) / 1.07),
        # A reviewer that continues until it has 5 tokens; figures printed by a simulation
        ([Stage(0.75, 5, 0.0, (tail(0.3, 10),))], 3.357),
        ([Stage(0.75, 5, 0.0, (tail(0.3, 10),)), tail(0.25, 10)], 3.4284),
    ],
)
def test_the_formulas_give_the_papers_cases(stages, wanted):
    assert improvement(stages) == pytest.approx(wanted, abs=5e-5)


def simulated(stages: list[Stage], rng: random.Random) -> tuple[int, float]:
    """One simulated round: emitted tokens, and cost."""
    accepted, alive, cost = 0, True, 0.0
    for stage in stages:
        drafted = 0
        while drafted < stage.length:
            if stage.reviews:
                gained, inner = simulated(list(stage.reviews), rng)
                drafted, cost = drafted + gained, cost + stage.cost + inner
            else:
                drafted += stage.length if stage.proposes else 1
                cost += stage.cost
        for _ in range(drafted):
            alive = alive and rng.random() < stage.acceptance
            accepted += alive
    return accepted + 1, cost


def test_three_levels_and_a_tail_agree_with_simulation():
    stages = [Stage(0.8, 4, 0.1, (Stage(0.6, 2, 0.02, (tail(0.4, 3, 0.001),)), tail(0.3, 4))), tail(0.5, 6, 0.001)]
    counts, cost, _ = expected_round(stages)
    rng = random.Random(0)
    rounds = [simulated(stages, rng) for _ in range(20_000)]
    tokens, costs = (sum(values) / len(rounds) for values in zip(*rounds, strict=True))
    assert counts.sum() == pytest.approx(1)
    assert mean(counts) == pytest.approx(tokens, rel=0.02)
    assert cost == pytest.approx(costs, rel=0.02)


def pair():
    """A target and a drafter that agree often enough to be worth planning."""
    return tiny.tiny("llama"), tiny.drafter_of("llama")


PROMPTS = [{"input_ids": torch.tensor([[3, 5, 7, 3, 5, 7, 3, 5]])}, {"input_ids": torch.tensor([[9, 4, 9, 4, 9]])}]


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replay_counts_the_rounds_that_decoding_takes(sampled):
    """For one drafter the replay is exact; a copying tail is replayed as if the draft before it were text."""
    target, drafter = pair()
    options = {"max_new_tokens": 24, "do_sample": sampled, "eos_token_id": None}
    for k_matrix, error in ([[3, 0], [0, 0]], 1e-9), ([[0, 6], [0, 0]], 1e-9), ([[2, 5], [0, 0]], 0.1):
        for prompt in PROMPTS:
            torch.manual_seed(1)
            measured = measure_drafters(target, [ModelDrafter(drafter), MaxGram()], [prompt], **options)
            cascade = CascadeDrafter([drafter, MaxGram()], k_matrix=k_matrix, schedule="fixed")
            torch.manual_seed(1)
            target.generate(**prompt, **options)  # as the planner did first: the same seeds are drawn from here on
            target.generate(**prompt, assistant=cascade, **options)
            real = cascade.report.block_efficiency
            assert expect(k_matrix, measured).tokens_per_round == pytest.approx(real, rel=error)


def test_a_replayed_review_is_near_what_decoding_takes():
    target, drafter = pair()
    measured = measure_drafters(
        target, [ModelDrafter(drafter), MaxGram()], PROMPTS, max_new_tokens=32, do_sample=False
    )
    k_matrix = [[3, 4], [0, 3]]
    cascade = CascadeDrafter([drafter, MaxGram()], k_matrix=k_matrix, schedule="fixed")
    for prompt in PROMPTS:
        target.generate(**prompt, assistant=cascade, max_new_tokens=32, do_sample=False)
    assert expect(k_matrix, measured).tokens_per_round == pytest.approx(cascade.report.block_efficiency, rel=0.15)


def test_a_tree_is_replayed_by_what_it_offers():
    target, drafter = pair()
    tree = ModelDrafter(drafter, depth=3, tree=BestFirst(branches=2, nodes=6))
    measured = measure_drafters(target, [tree], PROMPTS[:1], max_new_tokens=24, do_sample=False)
    cascade = CascadeDrafter([tree], k_matrix=3, schedule="fixed")
    target.generate(**PROMPTS[0], assistant=cascade, max_new_tokens=24, do_sample=False)
    assert list(measured.depths[0]) == [3]
    assert expect([[3]], measured).tokens_per_round == pytest.approx(cascade.report.block_efficiency)


def made_measurements(model_step: float, agrees: float = 0.9, right: int = 3) -> Measured:
    """A target of 1 second a forward, a model drafter, and a drafter that knows `right` tokens everywhere."""
    rng = random.Random(0)
    target, model, copier = Costs(), Costs(), Costs()
    for width in range(1, 40):
        target.reviews.add(width, 1.0)
        model.reviews.add(width, model_step)
    for steps in (1, 6):
        model.drafts.add(steps, model_step * steps)
    copier.drafts.add(1, 0.0)
    choices = [rng.random() < agrees for _ in range(200)]
    traces = [Trace(200, {0: choices}, {1: [Proposal(8, 8, right)] * 200}, 200.0, 0.0, [1.0, model_step, 0.0])]
    return Measured(traces, target, [model, copier], [True, False], [range(1, 9), (1, 2, 4, 8)])


def test_the_search_finds_what_a_grid_finds():
    measured = made_measurements(0.05)
    best = search(measured)[0]
    lengths = (range(0, 9), (0, 1, 2, 4, 8), (0, 1, 2, 4, 8))
    grid = [((a, b), (0, c)) for a, b, c in itertools.product(*lengths) if a or b]
    speeds = [expect(cleaned(k_matrix), measured).speedup for k_matrix in grid]
    assert best.expected.speedup == pytest.approx(max(speeds))


def test_a_drafter_that_does_not_pay_is_left_out():
    expensive = search(made_measurements(0.9, agrees=0.2))[0]
    assert expensive.kept == [1]
    assert expensive.trimmed() == [[4]]  # the shortest length that fits the 3 tokens it knows
    useless = search(made_measurements(0.01, right=0))[0]
    assert useless.kept == [0]


def test_auto_plans_once_reports_it_and_changes_no_text(capsys, tmp_path):
    target, drafter = pair()
    cascade = CascadeDrafter([drafter, MaxGram()], k_matrix="auto")
    assert cascade.plan is None
    ids = torch.tensor([[3, 5, 7, 3, 5, 7], [0, 0, 9, 4, 9, 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 12, "pad_token_id": 0}
    for sampled in (False, True):
        torch.manual_seed(2)
        wanted = target.generate(**inputs, do_sample=sampled, assistant=MaxGram())
        torch.manual_seed(2)
        assert torch.equal(target.generate(**inputs, do_sample=sampled, assistant=cascade), wanted)
    ids = torch.tensor([[3, 5, 7]])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("csdraft:")]
    assert re.search(r'k_matrix="auto" was planned for \S+ in [\d.]+ s: \[\[', line)
    planned = cascade.planned(target, ids, {})
    assert cascade.plan is planned
    planned.save_pretrained(tmp_path / "kept")
    assert CascadeDrafter.from_pretrained(tmp_path / "kept", target=target).k_matrix == planned.k_matrix
    assert capsys.readouterr().err == "", "it plans once"
    assert planned is cascade.planned(target, ids, {})
    assert planned.k_matrix != "auto"
    assert cascade.report.calls == 2
    plan, sizes = cascade.report.planned, (len(planned.drafters),) * 2
    assert plan is not None
    assert (len(plan.k_matrix), len(plan.drafters)) == sizes
    assert tuple(map(tuple, plan.k_matrix)) == planned.k_matrix
    assert 1 <= plan.tokens_per_round <= 33
    assert Report.from_dict(cascade.report.to_dict()).planned == plan
    said = str(cascade.report)
    assert f"expected {plan.tokens_per_round:.2f} tokens a round and {plan.speedup:.2f} x plain" in said
    assert f"measured {cascade.report.block_efficiency:.2f}\n" in said, "a batch has no speed to compare with plain's"
    target.generate(ids, max_new_tokens=12, pad_token_id=0, do_sample=False, assistant=cascade)
    assert " x\n" in str(cascade.report)


def test_auto_plans_on_a_text_that_fits_the_positions():
    """Both models have 256 learned positions, and the prompt leaves 6."""
    cascade = CascadeDrafter([tiny.drafter_of("gpt2"), MaxGram()], k_matrix="auto")
    ids = tiny.prompt(length=250)
    tiny.tiny("gpt2").generate(**ids, max_new_tokens=6, do_sample=False, assistant=cascade, strict=True)
    assert cascade.plan is not None
    target = get_peft_model(tiny.fresh("gpt2", max_position_embeddings=64), LoraConfig(target_modules=["c_attn"]))
    assert cascade.planned(target, ids["input_ids"], {}).forecast is not None, "a model in a wrapper has positions too"


# Tuning in a given time.


@dataclass
class Clock:
    """Time that passes when a test says so."""

    time: float = 0.0

    def __call__(self) -> float:
        return self.time


def test_an_allowance_reports_the_share_that_has_passed():
    clock, said = Clock(), []
    allowance = Allowance(100.0, lambda what, share: said.append(share), clock)
    for clock.time in (0.0, 20.0, 120.0):
        allowance.tell("a")
    assert said == [0.0, 0.2, 0.99]
    assert allowance.remaining == 0


def fake_generate(monkeypatch, clock: Clock, seconds: dict[str, float]) -> list[str]:
    """Replaces `generate` by one that takes these seconds for each cell; returns the cells that were run."""
    asked: list[str] = []

    def generate(setup, cell, group):
        del setup, group
        asked.append(cell.name)
        clock.time += seconds[cell.name]
        return Result(seconds[cell.name], None, ((1, 2),))

    monkeypatch.setattr(bench, "generate", generate)
    return asked


@pytest.mark.parametrize(("seconds", "steps"), [(1000.0, 8), (30.0, 6), (13.0, 2), (1.0, 1)])
def test_timing_ends_in_time_with_whole_turns(monkeypatch, seconds, steps):
    """All cells have run on a prompt, or none."""
    clock, said = Clock(), []
    asked = fake_generate(monkeypatch, clock, {"plain": 3.0, "0": 1.0})
    allowance = Allowance(seconds, lambda what, share: said.append(share), clock)
    cells = [Cell(Method("plain", {})), Cell(Method("0", {}))]
    run = timed(Setup(None, clock=clock), cells, [(1,), (2,), (3,), (4,)], 2, allowance)
    assert [sum(sample.cell == name for sample in run.samples) for name in ("plain", "0")] == [steps, steps]
    assert clock.time <= max(seconds, 8.0)
    assert asked[:6] == ["plain", "0", "plain", "0", "0", "plain"][: len(asked)]  # warmed up, then in turns
    assert said[-1] == 1.0


def candidates_of(times: dict[str, list[list[float]]]) -> list[Candidate]:
    plan = search(made_measurements(0.05))[0]
    made = {name: (plan, {"lenience": 1.0, "schedule": "fixed"}, CascadeDrafter([MaxGram()], 4)) for name in times}
    del made["plain"]
    run = bench.Run()
    for name, table in times.items():
        for group, row in enumerate(table):
            for repetition, seconds in enumerate(row):
                run.add(name, group, repetition, Result(seconds, None, ((1, 2),)))
    return ranked(made, run, 32)


def test_a_result_names_rows_that_may_be_equally_fast():
    plain = [[4.0, 4.1], [4.0, 3.9], [4.0, 4.0], [4.2, 4.0]]
    noisy = [[1.0, 1.1], [1.1, 1.0], [1.0, 0.9], [0.9, 1.0]]
    slow = [[2.0, 2.1], [2.1, 2.0], [2.0, 1.9], [1.9, 2.0]]
    found = candidates_of({"plain": plain, "a": slow, "b": [[1.0, 1.0]] * 4, "c": noisy})
    assert [one.told_apart for one in found] == [False, False, True]
    said = how_sure(found, 12)
    assert "timed on 4 of 12 prompts, up to 2 times each, up to 32 tokens" in said
    assert "row 2 cannot be told apart from row 1" in said
    few = candidates_of({"plain": plain[:2], "a": slow[:2], "b": [[1.0, 1.0]] * 2})
    assert not few[1].told_apart, "two prompts prove nothing"
    assert "row 1 is faster than every other row" in how_sure([found[0], found[2]], 4)


def test_short_times_allow_short_texts_and_few_plans():
    target, drafter = pair()
    setup = Setup(target, {"max_new_tokens": 96, "do_sample": False, "pad_token_id": 0})
    clock = Clock()

    def ticking() -> float:
        clock.time += 1.0  # 16 tokens a second
        return clock.time

    drafters = [ModelDrafter(drafter), MaxGram()]
    for seconds, length in ((60.0, 48), (1.0, 16), (math.inf, 96)):  # twice five passes of 48 fill half of a minute
        allowance = Allowance(seconds, lambda *_: None, ticking)
        assert affordable_length(setup, drafters, [(3, 5, 7)], allowance) == length
    plans = search(made_measurements(0.05))[:4]
    for seconds, count in ((1000.0, 4), (0.0, 1)):
        assert len(affordable(plans, (1.0,), 1.0, 12, Allowance(seconds, lambda *_: None, Clock()))) == count
    with pytest.raises(ValueError, match="minutes=0 leaves no time"):
        tuning.tune(target, drafters, [(3, 5, 7)], minutes=0)


def test_a_search_ends_when_the_time_is_up():
    measured = made_measurements(0.05)
    assert 0 < len(search(measured, lambda: True)) < len(search(measured))
