"""No work and no memory is in proportion to a number that somebody wrote down: the room in the text bounds it all."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_type_hints

import pytest
import torch

from csdraft import CascadeDrafter, Drafter, Horizontal, MaxGram, ModelDrafter, Vertical, spec
from csdraft.decoding.interfaces import Schedule
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.contracts import methods

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5] * 6])
NEW, SECONDS = 4, 0.5
HUGE = (10**6, 10**9)


def whole_options(method: Any) -> dict[str, Any]:
    """The options that take whole numbers, each with a function that makes a value of a huge one."""
    found, own = {}, {field.name for field in fields(method) if field.init}
    for name, hint in get_type_hints(type(method)).items():
        leaves = spec._leaves(hint)
        if name in own and int in leaves and not any(map(spec._is_table, leaves)):
            old = getattr(method, name)
            found[name] = wrapped(old) if isinstance(old, tuple) else lambda huge: huge
    return found


def wrapped(old: tuple) -> Any:
    """Huge numbers in place of those of a tuple, however it is nested."""
    return lambda huge: tuple(wrapped(inner)(huge) if isinstance(inner, tuple) else huge for inner in old)


def cases() -> list[tuple[str, str, str, int]]:
    kinds = {"drafters": methods.drafter, "trees": methods.branching, "schedules": methods.schedule,
             "verifiers": methods.verifier}  # fmt: skip
    found = []
    for family, make in kinds.items():
        for type in spec.types(family):
            made = make(type)
            method = made.tree if family == "trees" else made
            found += [(family, type, option, huge) for option in whole_options(method) for huge in HUGE]
    return found


def generated(drafter: Drafter, schedule: Schedule | str, verifier: Any = None) -> list[int]:
    options = {} if verifier is None else {"verifier": verifier}
    out = tiny.tiny("llama").generate(
        PROMPT, assistant=drafter, schedule=schedule, strict=True, max_new_tokens=NEW, **options
    )
    return out[0].tolist()


@cache
def plain() -> list[int]:
    generated(MaxGram(), "fixed")  # warm
    return tiny.tiny("llama").generate(PROMPT, max_new_tokens=NEW)[0].tolist()


def check(drafter: Drafter, schedule: Schedule | str, verifier: Any = None) -> None:
    wanted = plain()
    began = time.process_time()
    assert generated(drafter, schedule, verifier) == wanted
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(("family", "type", "option", "huge"), cases())
def test_a_huge_option_costs_nothing_or_is_refused(family, type, option, huge):
    """It costs nothing, or is refused when it is made, by name."""
    made = {"drafters": methods.drafter, "trees": methods.branching, "schedules": methods.schedule,
            "verifiers": methods.verifier}[family](type)  # fmt: skip
    method = made.tree if family == "trees" else made
    value = whole_options(method)[option](huge)
    began = time.process_time()
    try:
        method = replace(method, **{option: value})
    except ValueError as error:
        if option not in str(error):
            pytest.fail(f"{option} is refused without being named: {error}")
        return
    assert time.process_time() - began < SECONDS
    if family == "schedules":
        for drafter in (MaxGram(), CascadeDrafter([ModelDrafter(tiny.drafter_of("llama")), MaxGram()], 10**6)):
            check(drafter, method)
    elif family == "verifiers":
        check(MaxGram(), "fixed", method)
    else:
        drafter = replace(made, tree=method) if family == "trees" else method
        for schedule in ("fixed", "cost_model"):
            check(drafter, schedule)
            check(Horizontal((drafter, MaxGram()), (10**6, 10**6)), schedule)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("schedule", methods.SCHEDULES)
def test_a_huge_k_matrix_costs_nothing(schedule, huge):
    small = tiny.drafter_of("llama")
    for matrix in ([[huge, 12], [0, 4]], [[3, huge], [0, huge]], [[huge, huge], [0, huge]], huge):
        check(CascadeDrafter([small, MaxGram(depth=huge)], matrix), schedule)
    check(Vertical(small, MaxGram(depth=huge), inner_length=huge, depth=huge), schedule)


def test_a_plan_of_huge_drafters_is_bounded(monkeypatch):
    """The planner asks for no more than its own deepest draft."""
    monkeypatch.setattr("csdraft.planner.search.TOKENS", NEW)
    small = tiny.drafter_of("llama")
    nest = Vertical(small, MaxGram(depth=10**9), depth=10**9)
    cascade = CascadeDrafter([nest, ModelDrafter(small, depth=10**9, tree=BestFirst(2, 4))], "auto")
    began = time.process_time()
    generated(cascade, "fixed")
    assert time.process_time() - began < 60 * SECONDS  # seconds of decoding; without a bound it never ends


@pytest.mark.parametrize("given", ["3", None, [3], float("nan")])
def test_what_is_no_number_is_named(given) -> None:
    for make in (lambda: ModelDrafter(tiny.tiny("llama"), given), lambda: MaxGram(given), lambda: BestFirst(given)):
        with pytest.raises(ValueError, match=r"(depth|branches)=.* must be"):
            make()
