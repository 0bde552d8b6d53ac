"""After a call every assistant has a report, whatever kind it is of, and nothing was set on a user's model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from dataclasses import dataclass, fields

import pytest

import csdraft
from csdraft import Drafter, MaxGram
from csdraft.decoding import reported
from tests import tiny
from tests.contracts.methods import DRAFTERS, drafter

GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "return_dict_in_generate": True}


def decoded(assistant: object, target: object = None, **options: object) -> csdraft.Report:
    return (target or tiny.tiny("llama")).generate(**tiny.prompt(), **GREEDY, assistant=assistant, **options).report


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_drafter_has_its_report(kind: str) -> None:
    """Of its own calls: an equal drafter has none, nor has a copy; and no option is called like it."""
    made = drafter(kind)
    assert made.report is made.last_report is csdraft.report(made) is None
    first = decoded(made)
    assert made.report == made.last_report == csdraft.report(made) == first
    second = decoded(made)
    assert (made.report.calls, made.report.emitted, made.last_report) == (2, 16, second)
    assert csdraft.report(made, last=True) == second
    assert copy.copy(made).report is drafter(kind).report is None
    assert not {"report", "last_report", "reset_report", "memory"} & {f.name for f in fields(type(made))}
    made.reset_report()
    assert made.report is made.last_report is None


def test_a_pickled_drafter_leaves_its_reports_behind() -> None:
    made = MaxGram()
    decoded(made)
    assert made.report.calls == 1
    assert pickle.loads(pickle.dumps(made)).report is copy.deepcopy(made).report is None


def test_a_plain_model_has_a_report_and_nothing_is_set_on_it() -> None:
    """As the assistant and as the target; also where each call makes a drafter of it."""
    assistant, target = copy.deepcopy(tiny.drafter_of("llama")), copy.deepcopy(tiny.tiny("llama"))
    before = {name: set(vars(model)) for name, model in (("assistant", assistant), ("target", target))}
    reports = [decoded(assistant, target) for _ in range(2)]
    assert csdraft.report(assistant) == csdraft.report(target) == reports[0] + reports[1]
    assert csdraft.report(assistant, last=True) == csdraft.report(target, last=True) == reports[1]
    assert before == {"assistant": set(vars(assistant)), "target": set(vars(target))}
    assert csdraft.report(copy.deepcopy(assistant)) is None


@pytest.mark.parametrize("name", ["auto", "max_gram"])
def test_a_name_has_a_report(name: str) -> None:
    before = csdraft.report(name)
    report = decoded(name)
    assert csdraft.report(name, last=True) == report
    assert csdraft.report(name).calls == (before.calls if before else 0) + 1


def test_a_path_has_a_report(tmp_path) -> None:
    csdraft.CascadeDrafter([MaxGram()]).save_pretrained(tmp_path / "saved")
    report = decoded(tmp_path / "saved")
    assert csdraft.report(str(tmp_path / "saved")) == csdraft.report(tmp_path / "saved") == report


@pytest.mark.drafts_nothing
def test_plain_decoding_is_the_targets() -> None:
    target = copy.deepcopy(tiny.tiny("llama"))
    report = decoded(None, target, custom_generate=csdraft.decode)
    assert report.plain_rounds == report.rounds == 8
    assert csdraft.report(target) == report
    assert csdraft.report(None) is None


def test_of_many_names_the_last_are_kept() -> None:
    names = [f"a name {i}" for i in range(reported.MOST_NAMES + 3)]
    for name in names:
        reported.keep(csdraft.Report(), name)
    assert [csdraft.report(name) is None for name in names] == [True] * 3 + [False] * reported.MOST_NAMES


def test_who_is_gone_has_no_report() -> None:
    made = MaxGram()
    decoded(made)
    known = len(reported._kept)
    del made
    gc.collect()
    assert len(reported._kept) < known


@dataclass(frozen=True)
class Broken(Drafter):
    def propose(self, contexts, budgets):
        raise RuntimeError("out of ideas")


def test_a_drafter_that_fails_has_a_report() -> None:
    made = Broken()
    with pytest.warns(RuntimeWarning, match="out of ideas"):
        decoded(made)
    assert made.report.failures == {"RuntimeError: out of ideas": 1}
    assert made.report.plain_rounds == 8


def test_two_threads_share_a_drafter() -> None:
    """Each call is counted once, and has numbers of its own."""
    made, reports = MaxGram(), []
    threads = [threading.Thread(target=lambda: reports.extend(decoded(made) for _ in range(4))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.emitted for report in reports] == [8] * 8
    assert (made.report.calls, made.report.emitted) == (8, 64)
    assert made.report.models["target"].forwards == sum(report.target_calls for report in reports)


def test_what_a_planner_tries_is_in_no_report(monkeypatch) -> None:
    monkeypatch.setattr("csdraft.planner.search.TOKENS", 4)
    target = copy.deepcopy(tiny.tiny("llama"))
    cascade = csdraft.CascadeDrafter([tiny.drafter_of("llama"), MaxGram()], "auto")
    report = decoded(cascade, target)
    assert cascade.report == cascade.plan.report == csdraft.report(target) == report
    assert report.planned is not None
