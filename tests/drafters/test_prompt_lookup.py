"""PromptLookup proposes what transformers' prompt lookup proposes, at a price that does not grow with the text."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from csdraft.decoding.interfaces import Budget
from csdraft.drafters.prompt_lookup import PromptLookup
from tests.drafters.standin import StandInCall, microseconds, proposed


def transformers_proposal(text: list[int], depth: int, max_ngram: int, eos: list[int]) -> list[int]:
    generator = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor(eos) if eos else None,
        num_output_tokens=depth,
        max_matching_ngram_size=max_ngram,
        max_length=10_000,
    )
    ids, _ = generator.get_candidates(torch.tensor([text]))
    return ids[0, len(text) :].tolist()


@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_equal_to_transformers(alphabet: int, max_ngram: int) -> None:
    """Drafted tokens count as text, as they would if they had been accepted."""
    generator = random.Random(100 * alphabet + max_ngram)
    drafter = PromptLookup(max_ngram=max_ngram)
    for _ in range(120):
        tokens = [generator.randrange(alphabet) for _ in range(generator.randint(1, 30))]
        eos = [0] if generator.random() < 0.3 else []
        split = generator.randint(1, len(tokens))
        depth = generator.randint(1, 12)
        call = StandInCall([tokens[:split]], eos)
        assert proposed(drafter, call, tokens[split:], depth) == transformers_proposal(tokens, depth, max_ngram, eos)


@pytest.mark.parametrize("max_ngram", [1, 2, 4])
def test_equal_to_transformers_while_the_text_grows(max_ngram: int) -> None:
    generator, drafter = random.Random(max_ngram), PromptLookup(max_ngram=max_ngram)
    for alphabet in (2, 4, 8):
        texts = [[generator.randrange(alphabet)] for _ in range(2)]
        call = StandInCall(texts, eos=[1])
        for _ in range(40):
            for row in range(2):
                path = [generator.randrange(alphabet) for _ in range(generator.randint(0, 4))]
                wanted = transformers_proposal(texts[row] + path, 10, max_ngram, [1])
                assert proposed(drafter, call, path, row=row) == wanted
                new = [generator.randrange(alphabet) for _ in range(generator.randint(0, 3))]
                call.texts[row].append(new)
                texts[row] = texts[row] + new


def test_two_settings_in_one_cascade_keep_their_own_index() -> None:
    call = StandInCall([[1, 2, 3, 9, 2, 4, 1, 2]])
    assert proposed(PromptLookup(max_ngram=1), call, depth=1) == [3]
    call = StandInCall([[8, 2, 5, 1, 2, 3, 1, 2]])
    assert proposed(PromptLookup(max_ngram=1), call, depth=1) == [5]
    assert proposed(PromptLookup(max_ngram=2), call, depth=1) == [3]


def test_depth_and_room() -> None:
    call = StandInCall([[1, 2, 3, 1]])
    assert proposed(PromptLookup(), call, depth=2) == [2, 3]
    assert proposed(PromptLookup(), call, depth=2, room=1) == [2]
    context = call.context(path=[2])
    assert PromptLookup().propose([context], [Budget(0, 5)])[0] is context.draft
    assert PromptLookup().propose([call.context()], [Budget(3, 3)])[0].tokens == (2, 3, 1)
    assert proposed(PromptLookup(), StandInCall([[]])) == []


@pytest.mark.parametrize("name", ["depth", "max_ngram"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        PromptLookup(**{name: 0})


@pytest.mark.parametrize("path", [(), (3, 1, 4, 1, 5)])
def test_a_proposal_costs_the_same_after_a_long_text(path: tuple[int, ...]) -> None:
    def cost(length: int) -> float:
        generator = random.Random(0)
        tokens = [generator.randrange(500) for _ in range(length + 200)]
        return min(
            microseconds(PromptLookup(), StandInCall([tokens[:length]]), tokens[length:], path) for _ in range(2)
        )

    short, long = cost(256), cost(8192)
    print(f"PromptLookup, path of {len(path)}: {short:.1f} us after 256 tokens, {long:.1f} after 8192")
    assert long < 3 * short
    assert long < 60
