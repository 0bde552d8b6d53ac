"""Lookahead's window moves as Jacobi iteration does, its n-grams are drafted, and it knows where it has no window."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import csdraft
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Round, Verdict
from csdraft.drafters.lookahead import Lookahead
from tests import tiny
from tests.drafters.standin import StandInCall, microseconds

ROOM = Budget(30, 30)
Model = Callable[[list[int]], int]


def step(drafter: Lookahead, call: StandInCall, model: Model, budget: Budget = ROOM) -> Draft:
    """One greedy round under a target that is a function of the text."""
    (draft,) = drafter.propose([call.context()], [budget])
    text = call.texts[0].tokens
    said = [model([*text, *(draft.tokens[i] for i in draft.path(node))]) for node in range(ROOT, len(draft))]
    accepted, node = [], ROOT
    while (child := draft.child(node, said[node + 1])) is not None:
        accepted.append(child)
        node = child
    scores = SimpleNamespace(top=lambda k: torch.tensor(said)[:, None])
    finished = Round(call.context(), draft, Verdict(accepted, said[node + 1]), 0, scores)  # type: ignore[arg-type]
    drafter.observe([finished])
    call.texts[0].append(finished.tokens)
    return draft


def paths(draft: Draft) -> list[list[int]]:
    """The tokens from the text to each leaf."""
    leaves = set(range(len(draft))) - set(draft.parents)
    return sorted([draft.tokens[node] for node in draft.path(leaf)] for leaf in leaves)


def scrambled(text: list[int]) -> int:
    """A target whose next token depends on the last three."""
    return (7 * text[-1] + 5 * text[-2] + 3 * text[-3] + 11) % 50


def test_the_window_by_hand() -> None:
    """W=3, N=3: a level is added, then every column gives an n-gram a round and moves on by a place."""
    call, drafter = StandInCall([[1, 2, 3]]), Lookahead(3, 3, 2, prompt=False)
    first = step(drafter, call, scrambled)
    a = list(first.tokens)
    assert first.is_chain
    assert len(a) == 3
    assert set(a) <= {1, 2, 3}, "the first guesses are tokens of the prompt"
    text = [1, 2, 3, scrambled([1, 2, 3])]
    assert call.texts[0].tokens == text, "and none of them is right here"

    # Column 0 has become text. The others have got the target's token after them.
    after = {j: scrambled([1, 2, 3, *a[: j + 1]]) for j in (1, 2)}
    second = step(drafter, call, scrambled)
    new = second.tokens[second.child(second.child(ROOT, a[1]), a[2])]  # type: ignore[arg-type]
    assert new == a[2]
    chain = [a[1], a[2]]
    assert [a[1], after[1]] in paths(second)
    assert [a[1], a[2], after[2]] in paths(second)
    third_start = next(path[2] for path in paths(second) if path[:2] == chain and path != [*chain, after[2]])
    assert third_start in {1, 2, 3}, "a new column comes from the prompt"

    # Both full columns have become n-grams, and have dropped their first token.
    grown = {1: scrambled([*text, a[1], after[1]]), 2: scrambled([*text, a[1], a[2], after[2]])}
    row = drafter._state(call.context())
    assert row.pool.after(a[1], 9)[:1] == ([(after[1], grown[1])] if a[1] != a[2] else [(after[2], grown[2])])
    assert row.pool.after(a[2], 9)[0] == (after[2], grown[2])
    third = step(drafter, call, scrambled)
    assert third.child(ROOT, after[1]) is not None
    assert [after[1], grown[1]] in [path[:2] for path in paths(third)]
    assert [after[1], after[2], grown[2]] in [path[:3] for path in paths(third)]


def test_guesses_become_right() -> None:
    """A target that reads only its last token: after N - 1 rounds the window knows what it will say."""

    def follows(text: list[int]) -> int:
        return (text[-1] + 1) % 20

    call, drafter, rounds = StandInCall([[1, 12, 3, 7, 15, 2, 9, 4]]), Lookahead(prompt=False), 0
    while len(call.texts[0]) < 88:
        step(drafter, call, follows)
        rounds += 1
    assert call.texts[0].new_tokens == [(5 + i) % 20 for i in range(len(call.texts[0].new_tokens))]
    assert rounds <= 40, "2 tokens a round"


def test_n_grams_are_drafted_newest_first() -> None:
    drafter, call = Lookahead(0, 3, 2), StandInCall([[5, 1, 1, 5, 2, 2, 5, 3, 3, 5]])
    (draft,) = drafter.propose([call.context()], [ROOM])
    assert paths(draft) == [[2, 2], [3, 3]], "G=2: the oldest is forgotten"
    assert draft.tokens[:2] == (3, 3)
    call = StandInCall([[5, 1, 1, 5, 2, 2, 5]], eos=[2])
    assert paths(drafter.propose([call.context()], [ROOM])[0]) == [[1, 1], [2]]


def test_depth_and_room() -> None:
    call, drafter = StandInCall([[1, 2, 3]]), Lookahead()
    assert drafter.depth == 10
    for _ in range(6):
        step(drafter, call, scrambled)
    for room in range(1, 13):
        (draft,) = drafter.propose([call.context()], [Budget(room, room)])
        assert max(draft.depths, default=-1) < room
        assert len(draft) <= drafter.width(room)
    assert drafter.propose([call.context()], [Budget(0, 9)])[0] is call.context().draft


def test_no_window_below_another_draft() -> None:
    call, drafter = StandInCall([[4, 9, 9, 9, 9, 1, 2]]), Lookahead()
    (draft,) = drafter.propose([call.context(path=(4,))], [ROOM])
    assert draft.tokens == (4, 9, 9, 9, 9)


def test_no_window_under_another_reviewer() -> None:
    """In a vertical cascade the target never sees the window: one round shows that."""
    widths = []

    class Seen(Lookahead):
        def propose(self, contexts, budgets):
            drafts = super().propose(contexts, budgets)
            widths.append(len(drafts[0]) - len(contexts[0].draft))
            return drafts

    def run(assistant: csdraft.Drafter) -> list[int]:
        widths.clear()
        options = {"max_new_tokens": 20, "do_sample": False, "schedule": "fixed", "strict": True}
        tiny.tiny("llama").generate(**tiny.prompt(), **options, assistant=assistant)
        return widths

    assert min(run(Seen(prompt=False))[1:-5]) > 0
    inner = run(csdraft.Vertical(tiny.drafter_of("llama", scale=0.3), Seen(prompt=False), depth=3, inner_length=10))
    assert max(inner) > 0
    assert sum(inner[-6:]) == 0


@pytest.mark.parametrize(("name", "least"), [("window", 0), ("ngram", 2), ("guesses", 1)])
def test_options_are_checked(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={least - 1}"):
        Lookahead(**{name: least - 1})


def test_a_proposal_is_cheap() -> None:
    tokens = [(31 * i * i + i) % 60 for i in range(32_000)]
    call, drafter = StandInCall([tokens]), Lookahead()
    for _ in range(8):
        step(drafter, call, scrambled)
    cost = min(microseconds(drafter, call, tokens[:200]) for _ in range(2))
    print(f"Lookahead: {cost:.1f} us")
    assert cost < 120
