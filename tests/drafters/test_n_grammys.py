"""N-Grammys ranks what followed the last token, and fills up from the target's own table."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget
from csdraft.drafters.n_grammys import NGrammys
from csdraft.tables.successors import SuccessorTable
from tests import tiny
from tests.drafters.standin import StandInCall, microseconds


def leaves(draft: Draft) -> list[list[int]]:
    ends = set(range(len(draft))) - set(draft.parents)
    return sorted([draft.tokens[node] for node in draft.path(leaf)] for leaf in ends)


def drafted(drafter: NGrammys, text: list[int], path: tuple[int, ...] = (), eos: tuple[int, ...] = ()) -> Draft:
    call = StandInCall([text], eos)
    (draft,) = drafter.propose([call.context(path=path)], [Budget(drafter.depth, 100)])
    return draft


def reference(text: list[int], match: int, length: int, rows: int) -> list[list[int]]:
    """The continuations of the text's ending by count, then by the latest."""
    tail, seen, last = text[-match:], Counter(), {}
    for start in range(match, len(text)):
        if text[start - match : start] == tail:
            found = tuple(text[start : start + length])
            whole = len(found) == length
            seen[found] += 1 if whole else 0
            last[found] = start
    order = sorted(last, key=lambda found: (-max(seen[found], 1), -last[found]))
    return [list(found) for found in order[:rows]]


@pytest.mark.parametrize("match", [1, 2])
def test_ranked_as_the_paper_says_while_the_text_grows(match: int) -> None:
    generator, compared = random.Random(match), 0
    for alphabet in (2, 4):
        call, drafter = StandInCall([[0]]), NGrammys(depth=3, rows=4, match=match)
        for _ in range(150):
            call.texts[0].append([generator.randrange(alphabet) for _ in range(generator.randint(0, 2))])
            text = call.texts[0].tokens
            wanted = reference(text, match, 3, 4)
            found = drafter._continuations(call.context()).after(text[-match:], 4, 3)
            assert found == wanted
            compared += len(found) > 1
            (draft,) = drafter.propose([call.context()], [Budget(3, 3)])
            if wanted:
                tip = [draft.tokens[node] for node in draft.path(draft.tip)]
                assert tip[: len(wanted[0])] == wanted[0], "the best row ends the draft"
    assert compared > 100


def test_one_tree_of_all_rows() -> None:
    text = [5, 1, 2, 9, 5, 1, 3, 9, 5, 1, 2, 9, 5, 7, 7, 9, 5]
    assert leaves(drafted(NGrammys(depth=2, rows=3), text)) == [[1, 2], [1, 3], [7, 7]]
    assert len(drafted(NGrammys(depth=2, rows=3), text)) == 5
    assert leaves(drafted(NGrammys(depth=2, rows=1), text)) == [[1, 2]]
    assert leaves(drafted(NGrammys(depth=2, rows=3), text, eos=(1,))) == [[1], [7, 7]]
    draft = drafted(NGrammys(depth=2, rows=1), text, path=(9, 5))
    assert draft.tokens == (9, 5, 1, 2)
    assert draft.is_chain


def test_the_table_fills_the_remaining_rows() -> None:
    values = np.array([[[(t + 1) % 6, (t + 2) % 6], [(t + 3) % 6, 0]] for t in range(6)])
    drafter = NGrammys(depth=4, rows=2, table=SuccessorTable(values))
    assert leaves(drafted(drafter, [4])) == [[1, 0, 1, 2], [5, 0, 1, 2]]
    assert leaves(drafted(drafter, [4, 4])) == [[4], [5, 0, 1, 2]], "n-grams of the text first"


def test_the_table_is_what_the_model_says_of_a_token_alone(tmp_path: Path) -> None:
    model = tiny.tiny("llama")
    table = SuccessorTable.build(model, rows=3, length=3, prefix=(tiny.BOS,), batch=50)
    assert table.successors.shape == (tiny.VOCAB, 3, 3)
    for token in (5, 60, 96):
        with torch.no_grad():
            best = model(torch.tensor([[tiny.BOS, token]])).logits[0, -1].topk(3).indices.tolist()
        assert table.successors[token, :, 0].tolist() == best
        ids = torch.tensor([[tiny.BOS, token, best[2]]])
        options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 2:].tolist()
        assert table.successors[token, 2].tolist() == wanted
    table.save(tmp_path / "table.safetensors")
    loaded = NGrammys(table=tmp_path / "table.safetensors").table
    assert isinstance(loaded, SuccessorTable)
    assert np.array_equal(loaded.successors, table.successors)
    with pytest.raises(ValueError, match="token 96, but the target has only 50 tokens"):
        NGrammys(table=table).check(StandInCall([[1]], vocab=50))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["depth", "rows", "match"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        NGrammys(**{name: 0})


def test_a_proposal_costs_the_same_after_a_long_text() -> None:
    generator = random.Random(0)
    for alphabet in (3, 500):
        tokens = [generator.randrange(alphabet) for _ in range(32_200)]
        cost = min(microseconds(NGrammys(), StandInCall([tokens[:32_000]]), tokens[32_000:]) for _ in range(2))
        print(f"NGrammys, {alphabet} kinds of tokens: {cost:.1f} us after 32000 tokens")
        assert cost < 120
