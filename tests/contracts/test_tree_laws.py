"""The laws for every tree in the folder, none of which is named here: alone, at every level of a cascade, and
drawn.

Exactness under independent draws is held by enumeration in tests/verifiers/test_exact_trees.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from csdraft import Drafter, Horizontal, MaxGram, Vertical
from csdraft.decoding.interfaces import Context
from csdraft.schedules.fixed import Fixed
from tests import tiny
from tests.contracts.methods import (
    GREEDY,
    LOSSLESS,
    NEW,
    SAMPLED,
    SEEDS,
    TREES,
    Forgetting,
    Watched,
    branching,
    decode,
    plain,
    prompts,
    verifier,
)

SWEEP = [(1, "alone"), (1, "everywhere"), (3, "alone"), (3, "everywhere")]
"""Rows, and where a tree stands. Greedy and coupled draws take one half each, `make slow` all."""


def half(*fast: tuple[int, str]) -> pytest.MarkDecorator:
    cases = [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in SWEEP]
    return pytest.mark.parametrize(("rows", "where"), cases)


JUDGES = [verifier(rule) for rule in LOSSLESS if verifier(rule).draws == "independent"]


def everywhere(type: str) -> Drafter:
    """The tree reviewed inside a cascade, as a later stage behind a chain, and with a tail behind it."""
    inner = Vertical(tiny.drafter_of("llama", scale=0.1), Watched(branching(type, scale=0.3)), depth=3, inner_length=2)
    return Watched(Horizontal((inner, Watched(branching(type)), MaxGram()), (2, 3, 3)))


@cache
def coupled(rows: int) -> list[list[int]]:
    """What coupled draws write, whoever drafts: here nobody."""
    options = {**SAMPLED, "row_seeds": SEEDS[:rows]}
    return decode(MaxGram(), prompts(rows), **options, schedule=Fixed(1)).sequences.tolist()


def standing(where: str, type: str) -> Drafter:
    return Watched(branching(type)) if where == "alone" else everywhere(type)


@half((1, "everywhere"), (3, "alone"))
@pytest.mark.parametrize("type", TREES)
def test_greedy_is_identical(type: str, rows: int, where: str) -> None:
    """Three rows everywhere: see the test that drops caches."""
    output = decode(standing(where, type), prompts(rows), **GREEDY)
    assert output.sequences.tolist() == plain(rows)
    assert output.report.target.accepted.total() > 0, "nothing was accepted, so this proves little"


@half((1, "alone"), (3, "everywhere"))
@pytest.mark.parametrize("type", TREES)
def test_coupled_draws_are_identical(type: str, rows: int, where: str) -> None:
    output = decode(standing(where, type), prompts(rows), **SAMPLED, row_seeds=SEEDS[:rows])
    assert output.sequences.tolist() == coupled(rows)
    assert output.report.target.accepted.total() > 0


@pytest.mark.parametrize("type", TREES)
def test_dropping_any_cache_changes_nothing_and_the_accounts_balance(type: str) -> None:
    for forget in (None, Forgetting(chance=0.3)):
        watched = Watched(everywhere(type), forget)
        assert decode(watched, prompts(3), **GREEDY).sequences.tolist() == plain(3)
        for session in watched.sessions:
            assert session.use.fed == session.kept + session.use.rolled_back - session.imported
        assert len(watched.sessions) == 3, "a model has one session, wherever it stands"
    assert forget.lost > 60, f"only {forget.lost} tokens were forgotten, so this shows little"


@pytest.mark.parametrize("type", TREES)
def test_independent_draws_or_a_refusal_that_names_both(type: str) -> None:
    """Where a verifier takes the tree, a batch is its rows, and one-hot distributions give the greedy text."""
    inputs, tree = prompts(3), branching(type).tree
    assert tree is not None
    taken = [judge for judge in JUDGES if not judge.chains_only and (not tree.draws or tree.draws in judge.kinds)]
    assert taken, "nobody judges this tree"
    for judge in JUDGES:
        if judge not in taken:
            named = f"{tree.draws!r}.*{judge.__class__.__name__}|draft trees, but {judge.__class__.__name__}"
            with pytest.raises(ValueError, match=named):
                decode(branching(type), inputs, **SAMPLED, row_seeds=SEEDS, verifier=judge)
    one_hot = {"do_sample": True, "top_k": 1, "max_new_tokens": NEW, "row_seeds": SEEDS}
    assert decode(branching(type), inputs, **one_hot, verifier=taken[-1]).sequences.tolist() == plain(3)
    tailed = lambda: Watched(Horizontal((Watched(branching(type)), MaxGram()), (3, 2)))  # noqa: E731 - made anew
    batch = decode(tailed(), inputs, **SAMPLED, row_seeds=SEEDS, verifier=taken[0]).sequences
    for row, text in enumerate(tiny.continuations(batch, inputs)):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
        alone = decode(tailed(), {"input_ids": ids}, **SAMPLED, row_seeds=SEEDS[row : row + 1], verifier=taken[0])
        assert text[: alone.sequences.shape[1]] == alone.sequences[0].tolist()


@pytest.mark.parametrize("type", TREES)
def test_a_tail_goes_on_from_a_branch_that_was_expected(type: str) -> None:
    """The tip is the end of the branch of first children, and the tail is below it."""
    seen = []

    def look(contexts: Sequence[Context]) -> None:
        seen.extend(context.draft for context in contexts if len(context.draft))

    for tail in (MaxGram(), Vertical(tiny.drafter_of("llama"), MaxGram(), depth=2, inner_length=1)):
        watched = Watched(tail, look)
        decode(Horizontal((branching(type), watched), (3, 2)), prompts(3), **GREEDY)
    assert sum(not draft.is_chain for draft in seen) > 10
    for draft in seen:
        path = draft.path(draft.tip)
        assert path == [draft.children(node)[0] for node in (-1, *path[:-1])]
        assert not draft.children(draft.tip)


@pytest.mark.parametrize("type", TREES)
def test_processors_that_read_the_text_are_applied_along_branches(type: str) -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **GREEDY}
    inputs = prompts(3)
    wanted = tiny.tiny("llama").generate(**inputs, **options)
    assert torch.equal(decode(branching(type), inputs, **options).sequences, wanted)
