"""The benchmark on tiny random models: every method runs, every text is compared, and the statistics are right."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import methods, overhead, pair, suites
from benchmarks.__main__ import COMMANDS, main
from benchmarks.claims import Claim
from benchmarks.figures import equal_to, figures
from benchmarks.grid import grid_search
from benchmarks.measure import Forwards, Run, measure
from benchmarks.memory import PeakMemory
from benchmarks.methods import METHODS, Setup, build
from benchmarks.render import table
from csdraft.bench import Cell, Method, Sample, equality, ratio
from csdraft.metrics.intervals import Interval, bootstrap_median
from csdraft.progress import Progress
from csdraft.schedules.fixed import Fixed
from tests.tiny import drafter_of, fresh, prompt, tiny

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

NEW = 8
PROMPTS = [tuple(prompt(length, seed)["input_ids"][0].tolist()) for length, seed in ((20, 0), (12, 1))]


@pytest.fixture
def setup() -> Setup:
    return Setup(tiny("llama"), {"max_new_tokens": NEW, "do_sample": False}, drafter=drafter_of("llama"), depth=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a drafter, a tokenizer and prompts on disk."""
    path = tmp_path_factory.mktemp("bench")
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1").save_pretrained(
        path / "target"
    )
    fresh("llama").save_pretrained(path / "target")
    drafter_of("llama").save_pretrained(path / "drafter")
    lines = [json.dumps({"id": str(i), "prompt": " ".join(f"w{t}" for t in ids)}) for i, ids in enumerate(PROMPTS)]
    (path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return path


def arguments(folder, *more: str) -> list[str]:
    paths = ["--target", folder / "target", "--drafter", folder / "drafter", "--prompts", folder / "prompts.jsonl"]
    common = ["--max-new-tokens", NEW, "--repetitions", 2, "--threads", 1, "--out", folder / "out"]
    return ["suites", *(str(argument) for argument in (*paths, *common, *more))]


def test_every_method_runs_and_is_saved(folder, capsys):
    assert main(arguments(folder, "--methods", ",".join(METHODS))) == 0
    saved = json.loads((folder / "out/bench.json").read_text())
    assert [f["name"] for f in saved["figures"]] == list(METHODS)
    for f in saved["figures"]:
        assert f["equal"] == f["compared"] == 2
        assert f["tokens_per_second"] > 0
        assert f["first_token_ms"] > 0
        assert f["speedup"]["low"] <= f["speedup"]["median"] <= f["speedup"]["high"]
        assert 0 < f["outside_share"] < 1
        assert f["block_efficiency"] >= 1
        assert (f["acceptance"] is None) == (f["name"] == "plain" or f["name"].startswith("hf_"))
    assert len(saved["samples"]) == len(METHODS) * 2 * 2
    assert {"cpu", "cores", "threads", "dtype", "versions"} <= set(saved["machine"])
    assert saved["settings"]["target"] == "target"
    assert (folder / "out/bench.svg").read_text().startswith("<?xml")
    assert str(folder) not in json.dumps(saved)
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
    assert "PASS" in printed


def test_a_suite_passes_or_fails(folder, capsys):
    status = main(arguments(folder, "short", "--limit", "1", "--context", "30"))
    saved = json.loads((folder / "out/short.json").read_text())
    assert len(saved["claims"]) == 5
    assert status == (0 if all(claim["passed"] for claim in saved["claims"]) else 1)
    assert saved["figures"][0]["tokens"] == 2 * NEW  # whatever the model's end-of-text token
    assert "cascade with the cost model" in capsys.readouterr().out


def test_batches_gain(setup):
    work = suites.Work(setup, PROMPTS, [], ["drafter"], 1, 2, True, Progress())
    outcome = suites.batch(work)
    assert [f.name for f in outcome.figures] == ["plain", "plain@8", "drafter", "drafter@8"]
    assert all(f.equal == f.compared == 1 for f in outcome.figures)
    assert any("at least 0.8" in claim.words for claim in outcome.claims)


def test_sampling_is_compared_with_csdraft_itself(setup):
    sampling = replace(setup, options={"max_new_tokens": NEW, "do_sample": True, "top_k": 0})
    work = suites.Work(
        sampling, PROMPTS, [], ["hf_assisted_fixed", "csdraft_empty", "drafter"], 1, 1, False, Progress()
    )
    found = {f.name: f for f in suites.methods_suite(work).figures}
    assert found["plain"].equal is found["hf_assisted_fixed"].equal is None
    assert found["drafter"].equal == 2


def test_another_text_is_reported(setup):
    """A mutant: a method that, at one repetition of one prompt, writes something else."""
    calls, options = [], {"max_new_tokens": NEW}

    def disturb() -> None:
        calls.append(None)
        options["max_new_tokens"] = NEW - (len(calls) == 5)

    mutant = Method("mutant", options, disturb)
    plain = Method("plain", {"max_new_tokens": NEW})
    bare = replace(setup, options={"do_sample": False})
    run = measure(bare, [Cell(plain), Cell(mutant)], PROMPTS, 2)
    assert figures(run, "plain", "plain", "plain").different == ()
    assert figures(run, "mutant", "plain", "plain").different == (1,)
    claim = suites.equality_claim([figures(run, "mutant", "plain", "plain")])
    assert not claim.passed
    assert "mutant on prompt 1" in str(claim)
    assert "DIFFERENT" in table([figures(run, "mutant", "plain", "plain")])


def test_equality_needs_every_repetition():
    same, other = ((1, 2),), ((1, 3),)
    texts = {("plain", 0): [same], ("plain", 1): [same], ("m", 0): [same], ("m", 1): [same, other]}
    assert equality(texts, "m", "plain") == (1, (1,))
    assert equality(texts, "plain", "plain") == (2, ())


def test_ratios_are_paired():
    """Prompts and repetitions of very different speed do not blur a constant ratio."""
    samples = [
        Sample(cell, group, repetition, seconds * (1 + group) * (3 if repetition else 1), None, 10)
        for cell, seconds in (("plain", 2.0), ("fast", 1.0))
        for group in range(3)
        for repetition in range(2)
    ]
    assert ratio(Run(samples), "fast", "plain") == Interval(2.0, 2.0, 2.0)


def test_bootstrap_against_known_data():
    """Many normal values: the interval of their median has the known width, 1.96 * sqrt(pi / 2) * sd / sqrt(n)."""
    values = np.random.default_rng(0).normal(10, 1, size=(400, 1))
    found = bootstrap_median(values)
    assert found.median == pytest.approx(10, abs=0.15)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * (np.pi / 2) ** 0.5 / 20, rel=0.2)
    assert bootstrap_median(values) == found  # the same data, the same interval


def test_bootstrap_draws_prompts():
    """Repetitions that agree are no evidence: two prompts at 1 and 3 leave everything between open."""
    assert bootstrap_median([[1.0] * 50, [3.0] * 50])[1:] == (1.0, 3.0)
    assert bootstrap_median([[2.0, 2.0]]) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_median([])


def test_hooks_count_and_leave(setup):
    with Forwards(setup.models) as forwards:
        setup.target.generate(**prompt(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert forwards.counts == [5, 0]
    assert forwards.seconds[0] > 0
    assert not setup.target._forward_hooks
    assert not setup.target._forward_pre_hooks


def test_memory_sees_an_allocation():
    with PeakMemory(setup_device()) as memory:
        kept = np.ones(4_000_000)
    if memory.peak is None:
        pytest.skip("this system does not tell")
    assert memory.peak > 0.9 * kept.nbytes


def setup_device():
    return tiny("llama").device


def test_overhead_measures_what_it_says():
    cases = overhead.measure_overhead(lengths=(32, 64), rounds=4, vocab=256)
    assert [case.drafted for case in cases if case.temperature == 0] == [overhead.CHAIN] * 4 + [64] * 2
    assert all(case.milliseconds > 0 for case in cases)
    assert len(overhead.overhead_claims(cases)) == len(cases) + 5
    assert "model drafter, T = 1" in overhead.overhead_table(cases)


def test_a_round_of_the_tree_is_one_forward_and_keeps_a_branch():
    target = overhead.cycle_model(256)
    out = target.generate(
        torch.arange(16)[None],
        assistant=overhead.Fan(),
        schedule=Fixed(overhead.CHAIN),
        max_new_tokens=45,
        return_dict_in_generate=True,
    )
    report = out.report
    assert (report.rounds, report.target_calls, report.emitted) == (5, 5, 45)


@pytest.mark.slow
def test_the_grid_is_searched(setup, monkeypatch):
    from benchmarks import grid

    for name in ("DRAFTER_LENGTHS", "MAX_GRAM_LENGTHS", "STAGE_LENGTHS", "TAIL_LENGTHS", "INNER_LENGTHS"):
        monkeypatch.setattr(grid, name, getattr(grid, name)[:2])
    choice = grid_search(setup, PROMPTS, 1, lambda what, share: None)
    assert choice.k_matrix in [[[a, b], [0, c]] for a in (1, 2) for b in grid.TAIL_LENGTHS for c in (2, 4)]
    assert choice.cascade in [method.name for method in choice.finalists]
    assert "<- chosen" in choice.table
    work = suites.Work(setup, PROMPTS, PROMPTS, [], 1, 1, True, Progress())
    outcome = suites.grid(work)
    assert outcome.claims[0].passed
    assert len(outcome.claims) == 3


def test_a_claim_passes_where_its_interval_does():
    assert Claim.ratio("fast", Interval(1.2, 0.9, 1.4), 1.1).passed
    assert not Claim.ratio("surely fast", Interval(1.2, 0.9, 1.4), 1.0, surely=True).passed
    assert str(Claim("short", "3 ms", 3.0, 2.0, most=True)).startswith("FAIL  short: 3 ms")


def test_unknown_names_are_errors(setup, folder):
    with pytest.raises(ValueError, match=r"unknown methods \['plian'\]; known: plain"):
        build(["plian"], setup)
    with pytest.raises(SystemExit, match="no model at 'nowhere'"):
        pair.load_model("nowhere", setup.target.device, setup.target.dtype)
    with pytest.raises(SystemExit, match="no prompts at"):
        pair.read_prompts("missing.jsonl")


def test_a_method_is_one_function(setup, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", {"plain": METHODS["plain"]})

    @methods.method
    def mine(setup: Setup) -> dict:
        """A new one."""
        return {"assistant": methods.Nothing(), "schedule": Fixed(0)}

    assert [method.name for method in methods.build(["mine"], setup)] == ["plain", "mine"]
    assert equal_to(methods.build(["mine"], setup)[1], True, []) == "plain"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {command} ")


def test_an_unknown_command_is_told_the_known_ones(capsys):
    assert main(["sweets"]) == 2
    told = capsys.readouterr()
    assert "no command 'sweets'" in told.err
    assert all(f"  {command} " in told.out for command in COMMANDS)


def test_progress_times_each_piece_of_work_by_itself() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for what, share in (("one", 0.5), ("one", 1.0), ("two", 0.0)):
        progress(what, share)
    shown = stream.getvalue()
    assert "one: 100%" in shown
    assert shown.index("one") < shown.index("two: 0%")
