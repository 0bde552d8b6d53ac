"""Laws 2 to 5 of the design for every drafter, verifier and schedule in the folders, none of which is named
here.

Law 1, exactness, is held by enumeration in tests/verifiers/test_exact.py and by the grid in test_grid.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from methods import DRAFTERS, LOSSLESS, SCHEDULES, Watched, branches, drafter, schedule, verifier

from csdraft import Drafter, MaxGram, spec
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Context
from csdraft.schedules.fixed import Fixed
from tests import tiny

NEW = 16
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLED = {"do_sample": True, "max_new_tokens": NEW, "temperature": 0.8, "top_k": 30}
SEEDS = [11, 5, 8]
FIXED = {"schedule": Fixed(), "strict": True}
UNTIMED = [policy for policy in SCHEDULES if policy not in ("bandit", "cost_model")]
"""Schedules that draft alike whatever a clock says."""


def written(assistant: Drafter | None, inputs: dict, **options: Any) -> Any:
    """The output of a call and its report."""
    how = FIXED | {"return_dict_in_generate": True} | options
    return tiny.tiny("llama").generate(**inputs, assistant=assistant, **how)


def plain(inputs: dict) -> list[list[int]]:
    return tiny.tiny("llama").generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize("family", ["drafters", "schedules", "verifiers"])
def test_methods_are_values(family: str) -> None:
    for type in spec.types(family):
        kind = spec.find(family, type)
        assert kind.__dataclass_params__.frozen, f"{type}: state of a call lives in the call"
        assert kind.__doc__, type
        assert not kind.__doc__.startswith(f"{kind.__name__}("), f"{type}: only dataclass's own docstring"


# Law 2: dropping any session's cache changes speed, never output.


def forgetting(seed: int) -> Callable[[Sequence[Context]], None]:
    """Some session of the call loses its cache, now and then."""
    rng = random.Random(seed)

    def forget(contexts: Sequence[Context]) -> None:
        for session in contexts[0].call.sessions:
            if rng.random() < 0.5:
                session.forget()

    return forget


def forgetful(type: str) -> Watched:
    forget = forgetting(1)
    return drafter(type, wrap=lambda inner: Watched(inner, forget))  # type: ignore[return-value]


@pytest.mark.parametrize("type", DRAFTERS)
def test_dropping_any_cache_changes_nothing(type: str) -> None:
    inputs, watched = tiny.inputs_of("llama", 3), forgetful(type)
    assert written(watched, inputs, **GREEDY).sequences.tolist() == plain(inputs)
    assert watched.sessions[0].use.rolled_back > 60, "nothing was ever forgotten, so this proves little"


@pytest.mark.parametrize("rule", LOSSLESS)
def test_dropping_any_cache_changes_no_draw(rule: str) -> None:
    inputs, options = tiny.inputs_of("llama", 3), {**SAMPLED, "row_seeds": SEEDS, "verifier": verifier(rule)}
    watched = forgetful("vertical")
    wanted = written(drafter("vertical", wrap=Watched), inputs, **options).sequences.tolist()
    assert written(watched, inputs, **options).sequences.tolist() == wanted
    assert watched.sessions[0].use.rolled_back > 60


@pytest.mark.parametrize("policy", SCHEDULES)
def test_dropping_any_cache_changes_nothing_under_any_schedule(policy: str) -> None:
    inputs = tiny.inputs_of("llama", 3)
    output = written(forgetful("horizontal"), inputs, **GREEDY, schedule=schedule(policy))
    assert output.sequences.tolist() == plain(inputs)


# Law 3: greedy chooses as sampling from one-hot distributions would.


def same_way(assistant: Drafter, inputs: dict, **options: Any) -> None:
    greedy = written(assistant, inputs, **GREEDY, **options)
    one_hot = written(assistant, inputs, do_sample=True, top_k=1, max_new_tokens=NEW, row_seeds=SEEDS, **options)
    assert greedy.sequences.tolist() == one_hot.sequences.tolist() == plain(inputs)
    assert (greedy.report.levels, greedy.report.lengths) == (one_hot.report.levels, one_hot.report.lengths)
    assert greedy.report.target.drafted == one_hot.report.target.drafted


@pytest.mark.parametrize("type", DRAFTERS)
def test_greedy_drafts_as_one_hot_sampling_does(type: str) -> None:
    same_way(drafter(type, wrap=Watched), tiny.inputs_of("llama", 3))


@pytest.mark.parametrize("rule", LOSSLESS)
def test_greedy_judges_as_one_hot_sampling_does(rule: str) -> None:
    same_way(drafter("vertical", wrap=Watched), tiny.inputs_of("llama", 3), verifier=verifier(rule))


@pytest.mark.parametrize("policy", UNTIMED)
def test_greedy_is_scheduled_as_one_hot_sampling_is(policy: str) -> None:
    same_way(drafter("vertical", wrap=Watched), tiny.inputs_of("llama", 3), schedule=schedule(policy))


# Law 4: a batch is its rows.


def rows_alone(make: Callable[[], Drafter], inputs: dict, **options: Any) -> None:
    """Each row of a sampled batch is what a batch of one writes with the same row seed."""
    batch = written(make(), inputs, **SAMPLED, row_seeds=SEEDS, **options)
    for row, text in enumerate(tiny.continuations(batch.sequences, inputs)):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
        alone = written(make(), {"input_ids": ids}, **SAMPLED, row_seeds=SEEDS[row : row + 1], **options)
        end = alone.sequences.shape[1]
        assert text[:end] == alone.sequences[0].tolist()
        assert set(text[end:]) <= {tiny.PAD}


@pytest.mark.parametrize("type", DRAFTERS)
def test_a_batch_is_its_rows_with_any_drafter(type: str) -> None:
    rows_alone(lambda: drafter(type, wrap=Watched), tiny.inputs_of("llama", 3))


@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_batch_is_its_rows_under_any_verifier(rule: str) -> None:
    rows_alone(lambda: drafter("model", wrap=Watched), tiny.inputs_of("llama", 3), verifier=verifier(rule))


@pytest.mark.parametrize("policy", SCHEDULES)
def test_a_batch_is_its_rows_under_any_schedule(policy: str) -> None:
    rows_alone(lambda: drafter("horizontal"), tiny.inputs_of("llama", 3), schedule=schedule(policy))


# Law 5: a model sees a token once, unless it was rolled back.


def balanced(watched: Drafter) -> None:
    assert isinstance(watched, Watched)
    assert watched.sessions, "nothing was drafted, so this proves nothing"
    for session in watched.sessions:
        assert session.use.fed == session.kept + session.use.rolled_back - session.imported
    assert watched.sessions[0].use.fed > 0


@pytest.mark.parametrize("type", DRAFTERS)
def test_the_accounts_balance_with_any_drafter(type: str) -> None:
    for rule in LOSSLESS:
        if verifier(rule).chains_only and branches(type):
            continue
        for watched in (drafter(type, wrap=Watched), forgetful(type)):
            options = SAMPLED if verifier(rule).draws == "independent" else GREEDY
            written(watched, tiny.inputs_of("llama", 3), **options, verifier=verifier(rule))
            balanced(watched)


@pytest.mark.parametrize("policy", SCHEDULES)
def test_the_accounts_balance_under_any_schedule(policy: str) -> None:
    watched = Watched(drafter("horizontal"))
    written(watched, tiny.inputs_of("llama", 3), **GREEDY, schedule=schedule(policy))
    balanced(watched)


# The contract notices what breaks it.


class Broken(MaxGram):
    """Spoils what it would have drafted."""

    def __init__(self, spoil: Callable[[Context, Draft], Draft]) -> None:
        super().__init__()
        object.__setattr__(self, "spoil", spoil)

    def propose(self, contexts, budgets):
        drafts = super().propose(contexts, [replace(b, room=b.room + 1, depth=b.depth + 1) for b in budgets])
        return [self.spoil(context, draft) for context, draft in zip(contexts, drafts, strict=True)]


SPOILT = {
    "more than its room": lambda context, draft: draft,
    "one-hot confidence": lambda context, draft: context.draft.extend((5,), context.call.level("x"), (1.0,)),
    "the nodes it was given are lost": lambda context, draft: Draft.chain((5,), context.call.level("x")),
    "the target's level": lambda context, draft: context.draft.extend((5,), 0),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_drafter_is_noticed(how: str) -> None:
    broken = drafter(
        "horizontal", wrap=lambda inner: Watched(Broken(SPOILT[how]) if isinstance(inner, MaxGram) else inner)
    )
    with pytest.raises(AssertionError):
        written(broken, tiny.inputs_of("llama", 3), **GREEDY)
