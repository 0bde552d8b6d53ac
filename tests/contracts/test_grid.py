"""Every drafter under every lossless verifier and every schedule writes plain `generate`'s greedy text."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest

from csdraft import spec
from tests import tiny
from tests.contracts.methods import DRAFTERS, LOSSLESS, SCHEDULES, branches, drafter, schedule, verifier

GREEDY = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}


@cache
def plain() -> list[list[int]]:
    return tiny.tiny("llama").generate(**tiny.inputs_of("llama", 2), **GREEDY).sequences.tolist()


PAIRS = [
    *product(DRAFTERS, LOSSLESS, ["fixed"]),
    *product(DRAFTERS, ["match"], [policy for policy in SCHEDULES if policy != "fixed"]),
    *product(["max_gram", "model"], LOSSLESS, [policy for policy in SCHEDULES if policy != "fixed"]),
]
"""Every two methods meet; not every three."""


@pytest.mark.parametrize(("type", "rule", "policy"), PAIRS)
def test_greedy_is_identical(type: str, rule: str, policy: str) -> None:
    how = {"verifier": verifier(rule), "schedule": schedule(policy), "strict": True}
    try:
        output = tiny.tiny("llama").generate(**tiny.inputs_of("llama", 2), **GREEDY, assistant=drafter(type), **how)
    except ValueError as refused:
        if not verifier(rule).chains_only or not branches(type) or "judges chains" not in str(refused):
            raise
        return
    assert output.sequences.tolist() == plain()
    if policy != "cost_model":  # which drafts when the clock says so
        assert output.report.target.drafted.total() > 0, "nothing was drafted, so this proves little"


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
