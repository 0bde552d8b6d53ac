"""Ouroboros lengthens drafts with phrases, and learns them from the text and from what was refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Verdict
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.tables.phrases import PhrasePool
from tests import tiny
from tests.drafters.standin import StandInCall


@dataclass(frozen=True)
class Says(Drafter):
    """Drafts the same tokens each time."""

    tokens: tuple[int, ...] = (7, 5)
    depth: int = 2  # type: ignore[assignment]

    def propose(self, contexts, budgets):
        pairs = zip(contexts, budgets, strict=True)
        return [c.draft.extend(self.tokens[: min(b.depth, b.room)], c.call.level(self)) for c, b in pairs]


def paths(draft: Draft) -> list[list[int]]:
    ends = set(range(len(draft))) - set(draft.parents)
    return sorted([draft.tokens[node] for node in draft.path(leaf)] for leaf in ends)


def fresh(drafter: Drafter | None = None, **options) -> Ouroboros:
    return Ouroboros(drafter or Says(), ngram=3, remember=False, **options)


def propose(drafter: Ouroboros, context: Context, depth: int = 10, room: int = 10) -> Draft:
    return drafter.propose([context], [Budget(depth, room)])[0]


def judge(drafter: Ouroboros, call: StandInCall, said: list[int], accepted: list[int], token: int) -> None:
    """A round with what the target says after the text and after each node of the draft."""
    draft = propose(drafter, call.context())
    assert len(said) == len(draft) + 1
    scores = SimpleNamespace(top=lambda k: torch.tensor(said)[:, None])
    finished = Round(call.context(), draft, Verdict(accepted, token), 0, scores)  # type: ignore[arg-type]
    drafter.observe([finished])
    call.texts[0].append(finished.tokens)


def test_phrases_of_the_text_are_branches_below_the_draft() -> None:
    """After `7 5` come the newest two phrases of 5: [2, 3] and [4, 6]."""
    call, drafter = StandInCall([[5, 9, 9, 5, 2, 3, 5, 4, 6, 1]]), fresh(phrases=2)
    judge(drafter, call, [0, 0, 0], [], 1)
    draft = propose(drafter, call.context())
    assert paths(draft) == [[7, 5, 2, 3], [7, 5, 4, 6]]
    assert draft.main_branch.tokens == (7, 5, 4, 6), "the newest phrase comes first"
    assert draft.parents[:2] == (ROOT, 0)
    assert max(propose(drafter, call.context(), room=3).depths) == 2
    assert propose(drafter, call.context(), depth=1).tokens == (7,)


def test_refused_drafts_teach_what_the_target_said_there() -> None:
    """The target says 8, 5, 6 after the text, 7, and 5: phrases `8 5` of 1, the text's end, and `5 6` of 7."""
    call, drafter = StandInCall([[1]]), fresh()
    judge(drafter, call, [8, 5, 6], [], 8)
    pool = drafter._pool(call)  # type: ignore[arg-type]
    assert pool.after(1, 9) == [(8, 5)]
    assert pool.after(7, 9) == [(5, 6)]


def test_a_phrase_is_corrected_where_it_was_refused() -> None:
    call, drafter = StandInCall([[5, 2, 3, 1]]), fresh()
    judge(drafter, call, [0, 0, 0], [], 1)
    assert paths(propose(drafter, call.context())) == [[7, 5, 2, 3]]
    judge(drafter, call, [7, 5, 2, 9, 0], [0, 1, 2], 9)
    assert drafter._pool(call).after(5, 1) == [(2, 9)], "not 2 3"  # type: ignore[arg-type]


def test_nothing_follows_the_end_of_a_text() -> None:
    call, drafter = StandInCall([[5, 2, 3, 1]], eos=[5]), fresh()
    judge(drafter, call, [0, 0, 0], [], 1)
    assert propose(drafter, call.context()).tokens == (7, 5)


def test_pools_of_two_targets_and_of_two_calls() -> None:
    first, second = tiny.tiny("llama"), tiny.drafter_of("llama")
    pool = PhrasePool.of(first, 2, 4)
    assert pool is PhrasePool.of(first, 2, 4)
    assert pool is not PhrasePool.of(second, 2, 4)
    drafter = Ouroboros(Says((4, 4)), ngram=3, pool=4)
    options = {"max_new_tokens": 4, "do_sample": False, "schedule": "fixed", "strict": True}
    first.generate(**tiny.prompt(), **options, assistant=drafter)
    prompt = tiny.prompt()["input_ids"][0].tolist()
    assert pool.after(prompt[16], 4)[-1] == tuple(prompt[17:19])
    fresh(Says((4, 4)), pool=5).propose([], [])
    assert PhrasePool.of(first, 2, 5).after(prompt[16], 4) == []


def test_the_pool_keeps_the_newest() -> None:
    pool = PhrasePool(1, 2)
    for phrase in (1, 2, 1, 3):
        pool.add(9, (phrase,))
    assert pool.after(9, 5) == [(3,), (1,)]
    assert pool.after(9, 1) == [(3,)]
    assert pool.after(8, 5) == []


@pytest.mark.parametrize(("name", "least"), [("phrases", 1), ("ngram", 2), ("pool", 1)])
def test_options_are_checked(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={least - 1}"):
        Ouroboros(Says(), **{name: least - 1})
