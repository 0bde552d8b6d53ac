"""Token Recycling unrolls the matrix it keeps, and keeps what the target found likely last."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Round, Verdict
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.tables.adjacency import KEPT, AdjacencyTable
from tests import tiny
from tests.drafters.standin import StandInCall, microseconds

VOCAB = 600


def filled(vocab: int = VOCAB) -> AdjacencyTable:
    """The successor of rank r of token t is 8 t + r + 1, round the vocabulary."""
    table = AdjacencyTable(vocab)
    ids = np.arange(vocab)
    table.update(ids, (KEPT * ids[:, None] + np.arange(KEPT) + 1) % vocab)
    return table


def ranks_of(draft: Draft, root: int, vocab: int = VOCAB) -> list[tuple[int, ...]]:
    """The ranks on each node's path, read off its tokens."""
    found = []
    for node in range(len(draft)):
        path = [root, *(draft.tokens[i] for i in draft.path(node))]
        found.append(tuple((b - KEPT * a - 1) % vocab for a, b in pairwise(path)))
    return found


def proposal(drafter: TokenRecycling, text: list[int], depth: int = 6, path: tuple[int, ...] = ()) -> Draft:
    call = StandInCall([text], vocab=VOCAB)
    (draft,) = drafter.propose([call.context(path=path)], [Budget(depth, depth)])
    return draft


def test_the_tree_that_the_matrix_implies() -> None:
    draft = proposal(TokenRecycling(table=filled()), [5, 3])
    ranks = ranks_of(draft, 3)
    assert len(set(ranks)) == len(draft) == 80
    assert Counter(map(len, ranks)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}, "the paper's layers"
    assert {r for r in ranks if len(r) == 6} == {(0,) * 6, (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)}
    assert {(1, 3), (0, 2, 1), (3, 0, 0, 0), (0, 1, 0, 0, 0)} <= set(ranks)
    assert ranks[draft.tip] == (0,) * 6, "another drafter continues after the likeliest path"


@pytest.mark.parametrize(("depth", "nodes"), [(1, 80), (3, 80), (6, 8), (6, 20), (2, 1)])
def test_smaller_trees(depth: int, nodes: int) -> None:
    drafter = TokenRecycling(table=filled(), nodes=nodes)
    draft = proposal(drafter, [3], depth)
    whole, ranks = ranks_of(proposal(TokenRecycling(table=filled()), [3]), 3), ranks_of(draft, 3)
    assert set(ranks) <= set(whole)
    assert len(draft) == drafter.width(depth) == min(nodes, sum(len(r) <= depth for r in whole), len(draft))
    assert max(map(len, ranks)) <= depth
    assert not any(ranks[draft.tip])
    assert len(ranks[draft.tip]) == max(map(len, ranks))


def test_what_follows_an_unknown_token_is_not_drafted() -> None:
    table = filled()
    table.successors[[25, 33]] = -1  # ranks 0 and 1 after 3, whose successors are 25, 26, ...
    table.successors[33] = range(100, 108)
    draft = proposal(TokenRecycling(table=table), [3])
    below = [draft.tokens[p] if p >= 0 else 3 for p in draft.parents]
    assert 25 not in below
    assert draft.tokens[draft.tip] == 25, "the likeliest path is shorter now"
    assert all(child in table.successors[parent] for child, parent in zip(draft.tokens, below, strict=True))
    table.successors[3] = -1
    assert not len(proposal(TokenRecycling(table=table), [3]))


def test_it_goes_on_from_a_draft() -> None:
    draft = proposal(TokenRecycling(table=filled(), nodes=9), [1, 2], path=(4, 3))
    alone = proposal(TokenRecycling(table=filled(), nodes=9), [3])
    assert draft.tokens == (4, 3, *alone.tokens)
    assert draft.parents == (-1, 0, *(parent + 2 for parent in alone.parents))


def finished(call: StandInCall, draft: Draft, accepted: list[int], top: list[list[int]]) -> Round:
    scores = SimpleNamespace(top=lambda k: torch.tensor(top)[:, :k])
    return Round(call.context(), draft, Verdict(accepted, 9), 0, scores)  # type: ignore[arg-type]


def test_every_scored_node_is_learned_and_the_text_wins() -> None:
    """Token 7 is drafted twice: the branch that was kept says what follows it."""
    table, call = AdjacencyTable(VOCAB), StandInCall([[2, 3]], eos=[1], vocab=VOCAB)
    drafter = TokenRecycling(table=table)
    draft = Draft((7, 8, 7, 1), (-1, -1, 1, 0), (1,) * 4, (float("nan"),) * 4)
    tops = [[100 * node + rank for rank in range(KEPT)] for node in range(5)]
    drafter.observe([finished(call, draft, [0], tops)])
    known = {token: table.successors[token].tolist() for token in range(VOCAB) if table.known(token)}
    assert known == {3: tops[0], 7: tops[1], 8: tops[2]}, "nothing follows the end of a text, token 1"
    call.texts[0].append([7])
    assert drafter.propose([call.context()], [Budget(1, 1)])[0].tokens == tuple(tops[1])
    drafter.observe([finished(call, Draft(), [], [[50] * KEPT])])
    assert table.successors[7].tolist() == [50] * KEPT, "the last that was seen counts"


@pytest.mark.drafts_nothing
def test_two_targets_never_share_a_matrix() -> None:
    first, second = tiny.tiny("llama"), tiny.drafter_of("llama")
    assert AdjacencyTable.of(first, VOCAB) is AdjacencyTable.of(first, VOCAB)
    assert AdjacencyTable.of(first, VOCAB) is not AdjacencyTable.of(second, VOCAB)
    mine = TokenRecycling(table=AdjacencyTable(tiny.VOCAB))
    options = {"max_new_tokens": 3, "do_sample": False, "assistant": mine}
    first.generate(**tiny.prompt(), **options)
    with pytest.raises(ValueError, match="another target"):
        second.generate(**tiny.prompt(), **options)


def drafted(drafter: TokenRecycling) -> int:
    options = {"max_new_tokens": 8, "do_sample": False, "schedule": "fixed", "return_dict_in_generate": True}
    output = tiny.tiny("llama").generate(**tiny.prompt(), **options, assistant=drafter)
    return output.report.target.drafted.total()


def test_the_matrix_outlives_a_call_or_does_not() -> None:
    kept, fresh = AdjacencyTable(tiny.VOCAB), AdjacencyTable(tiny.VOCAB)
    assert drafted(TokenRecycling(table=kept)) < drafted(TokenRecycling(table=kept))
    assert drafted(TokenRecycling(table=fresh, remember=False)) == drafted(TokenRecycling(remember=False))
    assert not fresh.known(int(tiny.prompt()["input_ids"][0, -1])), "a table to start from is not written to"


def test_saved_and_loaded(tmp_path: Path) -> None:
    filled(40).save(tmp_path / "new" / "table.safetensors")
    loaded = TokenRecycling(table=tmp_path / "new" / "table.safetensors").table
    assert isinstance(loaded, AdjacencyTable)
    assert np.array_equal(loaded.successors, filled(40).successors)
    with pytest.raises(ValueError, match="40 tokens, the target 97"):
        tiny.tiny("llama").generate(**tiny.prompt(), max_new_tokens=3, assistant=TokenRecycling(table=loaded))


@pytest.mark.parametrize("name", ["depth", "nodes"])
def test_options_are_checked(name: str) -> None:
    for value in (0, 81):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            TokenRecycling(**{name: value})


def test_a_proposal_is_cheap() -> None:
    call = StandInCall([[token % VOCAB for token in range(32_000)]], vocab=VOCAB)
    cost = min(microseconds(TokenRecycling(table=filled()), call, range(200)) for _ in range(2))
    print(f"TokenRecycling: {cost:.1f} us for 80 nodes")
    assert cost < 60
