"""Every drafter under every lossless verifier and every schedule writes plain `generate`'s greedy text."""

from __future__ import annotations

from itertools import product

import pytest

from csdraft import spec
from tests.contracts.methods import (
    DRAFTERS,
    GREEDY,
    LOSSLESS,
    SCHEDULES,
    decode,
    drafter,
    plain,
    prompts,
    refuses,
    schedule,
    verifier,
)

RULES, POLICIES = LOSSLESS, SCHEDULES


def pairwise() -> list[tuple[str, str, str]]:
    """Cases in which every two methods meet; not every three.

    Each drafter meets each rule under a schedule that changes from case to case; what has not met then is added.
    """
    cases = [
        (type, rule, POLICIES[(i + j) % len(POLICIES)])
        for i, type in enumerate(DRAFTERS)
        for j, rule in enumerate(RULES)
    ]
    met = {pair for case in cases if not refuses(case[1], case[0]) for pair in (case[::2], case[1:])}
    cases += [(type, "match", policy) for type, policy in product(DRAFTERS, POLICIES) if (type, policy) not in met]
    cases += [("model", rule, policy) for rule, policy in product(RULES, POLICIES) if (rule, policy) not in met]
    return [*dict.fromkeys(cases)]


PAIRS = pairwise()
MORE = sorted(set(product(DRAFTERS, RULES, POLICIES)) - set(PAIRS))
CASES = PAIRS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("type", "rule", "policy"), CASES)
def test_greedy_is_identical(type: str, rule: str, policy: str) -> None:
    how = GREEDY | {"verifier": verifier(rule), "schedule": schedule(policy)}
    if refuses(rule, type):
        with pytest.raises(ValueError, match="verifies only chains"):
            decode(drafter(type), prompts(2), **how)
        return
    output = decode(drafter(type), prompts(2), **how)
    assert output.sequences.tolist() == plain(2)
    if policy == "fixed":
        assert output.report.target.accepted.total() > 0, "nothing was accepted"
        assert output.report.acceptance_rate < 1, "nothing was rejected"


def test_every_two_methods_meet_and_are_not_refused() -> None:
    """But for the drafters that a rule must refuse, which meet it too."""
    met = {pair for case in PAIRS if not refuses(case[1], case[0]) for pair in (case[::2], case[1:])}
    assert met >= {*product(DRAFTERS, POLICIES), *product(RULES, POLICIES)}
    assert {case[:2] for case in PAIRS} == {*product(DRAFTERS, RULES)}


def test_some_pairs_are_refused_and_most_are_not() -> None:
    refused = [(type, rule) for type, rule in product(DRAFTERS, LOSSLESS) if refuses(rule, type)]
    assert 0 < len(refused) < len(DRAFTERS) * len(LOSSLESS) / 4


def test_a_new_file_is_found(tmp_path, monkeypatch) -> None:
    """The folder is all the registration there is, also for these tests: a file that says nothing else is walked."""
    import csdraft.drafters

    lines = ["from dataclasses import dataclass", "from csdraft import MaxGram", "__all__ = ['Newcomer']"]
    lines += ["@dataclass(frozen=True)", "class Newcomer(MaxGram):", "    needed: int = 3"]
    (tmp_path / "newcomer.py").write_text("\n".join(lines))
    monkeypatch.setattr(csdraft.drafters, "__path__", [*csdraft.drafters.__path__, str(tmp_path)])
    assert "newcomer" in spec.types("drafters")
    assert type(drafter("newcomer")).__name__ == "Newcomer"


def test_a_new_file_that_nobody_can_make_fails(tmp_path, monkeypatch) -> None:
    import csdraft.drafters

    lines = ["from dataclasses import dataclass", "from csdraft import Drafter", "__all__ = ['Demanding']"]
    lines += ["@dataclass(frozen=True)", "class Demanding(Drafter):", "    wanted: int"]
    (tmp_path / "demanding.py").write_text("\n".join(lines))
    monkeypatch.setattr(csdraft.drafters, "__path__", [*csdraft.drafters.__path__, str(tmp_path)])
    with pytest.raises(pytest.fail.Exception, match="say how to make one in MAKE"):
        drafter("demanding")
