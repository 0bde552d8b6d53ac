"""Merged drafts: one node for a token that several chose; drawn tokens stay apart; the text stays the target's."""

from __future__ import annotations

import pytest
import torch

from csdraft import MaxGram, ModelDrafter
from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft, Kind
from csdraft.decoding.interfaces import Context, Drafter
from csdraft.drafters.merged import Merged
from csdraft.schedules.fixed import Fixed
from csdraft.trees.recursive import Recursive
from csdraft.trees.sampled import Sampled
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.without_replacement import WithoutReplacement
from tests import tiny

CALL: Call = None  # type: ignore[assignment]


class Given(Drafter):
    """Hands up what it was made with."""

    def __init__(self, draft: Draft, name: str = ""):
        self.draft, self.name = draft, name

    def propose(self, contexts, budgets):
        return [self.draft for _ in contexts]


def merged(*drafts: Draft, before: Draft | None = None) -> Draft:
    context = Context(0, (), CALL, before or Draft())  # type: ignore[arg-type]
    (draft,) = Merged(tuple(map(Given, drafts))).propose([context], [None])  # type: ignore[list-item]
    return draft


def paths(draft: Draft) -> list[tuple[int, ...]]:
    return [tuple(draft.tokens[i] for i in draft.path(node)) for node in range(len(draft))]


def test_equal_tokens_become_one_node_and_the_first_drafter_keeps_the_tip() -> None:
    first = Draft().attach((5, 6, 7), (ROOT, ROOT, 0), 1)
    second = Draft.chain((5, 8, 9), 2)
    third = Draft.chain((6, 7), 3)
    draft = merged(first, second, third)
    assert sorted(paths(draft)) == [(5,), (5, 7), (5, 8), (5, 8, 9), (6,), (6, 7)]
    assert draft.main_branch.tokens == (5, 7)
    assert dict(zip(paths(draft), draft.levels, strict=True))[5,] == 1
    assert dict(zip(paths(draft), draft.levels, strict=True))[5, 8] == 2


def test_the_tip_is_where_another_drafter_has_gone_on() -> None:
    draft = merged(Draft.chain((5,), 1), Draft.chain((5, 6, 7), 2), Draft.chain((4, 4), 3))
    assert draft.main_branch.tokens == (5, 6, 7)
    assert merged(Draft(), Draft.chain((5, 6), 2), Draft.chain((4,), 3)).main_branch.tokens == (5, 6)
    assert len(merged(Draft(), Draft())) == 0


def test_a_context_of_its_own_is_handed_back_first() -> None:
    before = Draft.chain((1, 2), 4)
    draft = merged(before.extend((3, 4), 1), before.extend((3, 5), 2), before, before=before)
    assert draft.tokens[:2] == (1, 2)
    assert sorted(paths(draft)) == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 5)]
    assert draft.main_branch.tokens == (1, 2, 3, 4)


def drawn(tokens: tuple[int, ...], kind: Kind, distribution: torch.Tensor) -> Draft:
    return Draft().attach(tokens, (ROOT,) * len(tokens), 1, None, [distribution] * len(tokens), kind)


def test_draws_stay_apart_and_dependent_ones_are_refused() -> None:
    distribution, other = torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.9])
    draft = merged(drawn((1, 1), "iid", distribution), drawn((1,), "iid", other), Draft.chain((1, 0), 2))
    assert draft.tokens.count(1) == 4
    assert draft.probs is not None
    assert draft.probs.kind == "iid"
    assert {id(distribution), id(other), id(None)} == {id(row) for row in draft.probs.rows}
    beside = merged(drawn((0, 1), "without_replacement", distribution), Draft.chain((1,), 2))
    assert beside.probs is not None
    assert beside.probs.kind == "without_replacement"
    with pytest.raises(ValueError, match="Given draws siblings as 'without_replacement', Given as 'iid'"):
        merged(drawn((0, 1), "without_replacement", distribution), drawn((1,), "iid", other))


def test_trees_and_chains_of_models_are_merged() -> None:
    inputs, target = tiny.inputs_of("llama", 3), tiny.tiny("llama")
    how = {"max_new_tokens": 16, "schedule": Fixed(3), "strict": True, "return_dict_in_generate": True}
    noisy = ModelDrafter(tiny.drafter_of("llama", scale=0.3))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=16)
    alone = target.generate(**inputs, do_sample=False, assistant=noisy, **how)
    both = Merged((noisy, ModelDrafter(tiny.drafter_of("llama"), tree=Sampled()), MaxGram()))
    output = target.generate(**inputs, do_sample=False, assistant=both, **how)
    assert torch.equal(output.sequences, plain)
    assert output.report.block_efficiency > alone.report.block_efficiency
    sampled = {"do_sample": True, "row_seeds": [1, 2, 3], **how}
    target.generate(**inputs, assistant=both, verifier=Rejection(), **sampled)
    odd = Merged((noisy, ModelDrafter(tiny.drafter_of("llama"), tree=Recursive())))
    with pytest.raises(ValueError, match=r"ModelDrafter with a Recursive tree draws siblings as 'without_repl.*iid"):
        target.generate(**inputs, assistant=odd, verifier=WithoutReplacement(), **sampled)


def test_nobody_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Merged(())
