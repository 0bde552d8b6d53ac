"""Laws 2 to 5 of the design for every drafter, verifier and schedule in the folders, none of which is named
here.

Law 1, exactness, is held by enumeration in tests/verifiers/test_exact.py and by the grid in test_grid.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from csdraft import Drafter, MaxGram, spec
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Context
from tests import tiny
from tests.contracts.methods import (
    DRAFTERS,
    GREEDY,
    LOSSLESS,
    NEW,
    SAMPLED,
    SCHEDULES,
    SEEDS,
    Forgetting,
    Watched,
    decode,
    drafter,
    plain,
    prompts,
    refuses,
    schedule,
    verifier,
)


@pytest.mark.parametrize("family", ["drafters", "schedules", "verifiers"])
def test_methods_are_values(family: str) -> None:
    for type in spec.types(family):
        kind = spec.find(family, type)
        assert kind.__dataclass_params__.frozen, f"{type}: state of a call lives in the call"
        assert kind.__doc__, type
        assert not kind.__doc__.startswith(f"{kind.__name__}("), f"{type}: only dataclass's own docstring"


# Law 2: dropping any session's cache changes speed, never output.


def forgetful(type: str) -> Watched:
    """A drafter before whose proposals sessions lose their caches, half of the time."""
    forget = Forgetting()
    return drafter(type, wrap=lambda inner: Watched(inner, forget))  # type: ignore[return-value]


def decode_forgetting(watched: Watched, **options: Any) -> Any:
    """The output of a call that has lost much of what its models had read."""
    output = decode(watched, prompts(3), **options)
    assert isinstance(watched.before, Forgetting)
    assert watched.before.lost > 60, f"only {watched.before.lost} tokens were forgotten, so this shows little"
    return output


@pytest.mark.parametrize("type", DRAFTERS)
def test_dropping_any_cache_changes_nothing(type: str) -> None:
    assert decode_forgetting(forgetful(type), **GREEDY).sequences.tolist() == plain(3)


@pytest.mark.parametrize("rule", LOSSLESS)
def test_dropping_any_cache_changes_no_draw(rule: str) -> None:
    options = {**SAMPLED, "row_seeds": SEEDS, "verifier": verifier(rule)}
    wanted = decode(drafter("vertical", wrap=Watched), prompts(3), **options)
    output = decode_forgetting(forgetful("vertical"), **options)
    assert output.sequences.tolist() == wanted.sequences.tolist()
    assert wanted.report.target.accepted.total() > 0
    assert wanted.report.acceptance_rate < 1


@pytest.mark.parametrize("policy", SCHEDULES)
def test_dropping_any_cache_changes_nothing_under_any_schedule(policy: str) -> None:
    output = decode_forgetting(forgetful("horizontal"), **GREEDY, schedule=schedule(policy))
    assert output.sequences.tolist() == plain(3)


# Law 3: greedy chooses as sampling from one-hot distributions would.


def same_way(assistant: Drafter, inputs: dict, **options: Any) -> None:
    greedy = decode(assistant, inputs, **GREEDY, **options)
    one_hot = decode(assistant, inputs, do_sample=True, top_k=1, max_new_tokens=NEW, row_seeds=SEEDS, **options)
    assert greedy.sequences.tolist() == one_hot.sequences.tolist() == plain(3)
    assert (greedy.report.levels, greedy.report.lengths) == (one_hot.report.levels, one_hot.report.lengths)
    assert greedy.report.target.drafted == one_hot.report.target.drafted
    assert greedy.report.acceptance_rate < 1, "nothing was rejected, so this shows little"


@pytest.mark.parametrize("type", DRAFTERS)
def test_greedy_drafts_as_one_hot_sampling_does(type: str) -> None:
    same_way(drafter(type, wrap=Watched), prompts(3))


@pytest.mark.parametrize("rule", LOSSLESS)
def test_greedy_judges_as_one_hot_sampling_does(rule: str) -> None:
    same_way(drafter("vertical", wrap=Watched), prompts(3), verifier=verifier(rule))


@pytest.mark.parametrize("policy", SCHEDULES)
def test_greedy_is_scheduled_as_one_hot_sampling_is(policy: str) -> None:
    same_way(drafter("vertical", wrap=Watched), prompts(3), schedule=schedule(policy))


# Law 4: a batch is its rows.


def rows_alone(make: Callable[[], Drafter], inputs: dict, **options: Any) -> None:
    """Each row of a sampled batch is what a batch of one writes with the same row seed."""
    batch = decode(make(), inputs, **SAMPLED, row_seeds=SEEDS, **options)
    for row, text in enumerate(tiny.continuations(batch.sequences, inputs)):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
        alone = decode(make(), {"input_ids": ids}, **SAMPLED, row_seeds=SEEDS[row : row + 1], **options)
        end = alone.sequences.shape[1]
        assert text[:end] == alone.sequences[0].tolist()
        assert set(text[end:]) <= {tiny.PAD}


@pytest.mark.parametrize("type", DRAFTERS)
def test_a_batch_is_its_rows_with_any_drafter(type: str) -> None:
    rows_alone(lambda: drafter(type, wrap=Watched), prompts(3))


@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_batch_is_its_rows_under_any_verifier(rule: str) -> None:
    rows_alone(lambda: drafter("model", wrap=Watched), prompts(3), verifier=verifier(rule))


@pytest.mark.parametrize("policy", SCHEDULES)
def test_a_batch_is_its_rows_under_any_schedule(policy: str) -> None:
    rows_alone(lambda: drafter("horizontal"), prompts(3), schedule=schedule(policy))


# Law 5: a model sees a token once, unless it was rolled back.


def balanced(watched: Drafter) -> None:
    assert isinstance(watched, Watched)
    assert watched.sessions, "no session was open, so this shows nothing"
    for session in watched.sessions:
        assert session.use.fed == session.kept + session.use.rolled_back - session.imported
    assert watched.sessions[0].use.fed > 0


def judges(type: str, every: bool) -> list[str]:
    """All rules that take a drafter's drafts, or two of them, which are others for the next drafter."""
    judged = [rule for rule in LOSSLESS if not refuses(rule, type)]
    assert len(judged) > 1
    first = DRAFTERS.index(type)
    return judged if every else [judged[(first + step) % len(judged)] for step in (0, len(judged) // 2)]


def test_every_rule_judges_some_drafter() -> None:
    assert {rule for type in DRAFTERS for rule in judges(type, every=False)} == {*LOSSLESS}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two rules", "all rules"])
@pytest.mark.parametrize("type", DRAFTERS)
def test_the_accounts_balance_with_any_drafter(type: str, every: bool) -> None:
    for rule in judges(type, every):
        options = SAMPLED if verifier(rule).draws == "independent" else GREEDY
        watched = drafter(type, wrap=Watched)
        decode(watched, prompts(3), **options, verifier=verifier(rule))
        balanced(watched)
    judged = judges(type, every=True)
    for draws in {verifier(rule).draws for rule in judged}:
        rule = next(rule for rule in judged if verifier(rule).draws == draws)
        forgetting = forgetful(type)
        decode_forgetting(forgetting, **SAMPLED, verifier=verifier(rule))
        balanced(forgetting)


@pytest.mark.parametrize("policy", SCHEDULES)
def test_the_accounts_balance_under_any_schedule(policy: str) -> None:
    watched = Watched(drafter("horizontal"))
    decode(watched, prompts(3), **GREEDY, schedule=schedule(policy))
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
    "nodes that it was given": lambda context, draft: Draft.chain((5,), context.call.level("x")),
    "the target's level": lambda context, draft: context.draft.extend((5,), 0),
}
"""By what the contract says against it, what a drafter does."""


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_drafter_is_noticed(how: str) -> None:
    broken = drafter(
        "horizontal", wrap=lambda inner: Watched(Broken(SPOILT[how]) if isinstance(inner, MaxGram) else inner)
    )
    with pytest.raises(AssertionError, match=how):
        decode(broken, prompts(3), **GREEDY)


def test_a_call_that_drafts_or_forgets_nothing_is_noticed() -> None:
    with pytest.raises(AssertionError, match="nothing was drafted"):
        decode(Watched(MaxGram()), prompts(3), **GREEDY, schedule={"type": "fixed", "depth": 0})
    with pytest.raises(AssertionError, match="only 0 tokens were forgotten"):
        decode_forgetting(Watched(MaxGram(), Forgetting(chance=0.0)), **GREEDY)
