"""Max-Gram against its definition by brute force, the defects of the paper's code, and its cost."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from csdraft.decoding.interfaces import Budget
from csdraft.decoding.text import Text
from csdraft.drafters._history import NEAR, History
from csdraft.drafters.max_gram import MaxGram
from csdraft.tables.bigram import BigramTable
from tests.drafters.standin import StandInCall, microseconds, proposed


def longest_match(source: list[int], text: list[int], path: list[int]) -> tuple[int, bool, int]:
    """(length, whether it is in the text, last place) of the best earlier place that something follows."""
    ending, best = text + path, (0, False, -1)
    for in_text, document, known in ((False, source, len(source)), (True, text, len(ending))):
        for last in range(min(len(document), known - 1)):
            length = 0
            while length <= last and length < len(ending) and document[last - length] == ending[-1 - length]:
                length += 1
            if length:
                best = max(best, (length, in_text, last))
    return best


def expected(source: list[int], text: list[int], path: list[int], depth: int, min_match: int = 1) -> list[int]:
    length, in_text, last = longest_match(source, text, path)
    if length < min_match or not length:
        return []
    if not in_text:
        return source[last + 1 :][:depth]
    known = text + path
    for place in range(last + 1, last + 1 + depth):
        known.append(known[place])
    return known[len(text) + len(path) :]


def word(generator: random.Random, alphabet: int, most: int, least: int = 0) -> list[int]:
    return [generator.randrange(alphabet) for _ in range(generator.randint(least, most))]


@pytest.mark.parametrize("alphabet", [1, 2, 3, 6])
def test_the_most_recent_of_the_longest_matches(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(1000):
        text, path = word(generator, alphabet, 40, 1), word(generator, alphabet, 8)
        depth, min_match = generator.randint(1, 12), generator.randint(1, 3)
        drafter = MaxGram(min_match=min_match)
        assert proposed(drafter, StandInCall([text]), path, depth) == expected([], text, path, depth, min_match)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 6])
def test_an_index_that_grew_is_an_index_made_at_once(alphabet: int) -> None:
    """Also: drafts that were never committed leave no trace."""
    generator = random.Random(alphabet)
    for _ in range(60):
        text = word(generator, alphabet, 5, 1)
        call = StandInCall([text])
        for _ in range(12):
            path = word(generator, alphabet, 6)
            assert proposed(MaxGram(), call, path) == expected([], text, path, 10)
            new = word(generator, alphabet, 4)
            call.texts[0].append(new)
            text = text + new
        assert len(call.memos) == 1


@pytest.mark.parametrize("alphabet", [1, 2, 4])
def test_the_encoder_input_is_a_document_in_front(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(1000):
        source, text = word(generator, alphabet, 20, 1), word(generator, alphabet, 12, 1)
        path = word(generator, alphabet, 5)
        call = StandInCall([text], sources=[source])
        assert proposed(MaxGram(), call, path) == expected(source, text, path, 10)


def test_encoder_padding_is_not_searched() -> None:
    call = StandInCall([[3], [3]], sources=[[9, 3, 9, 5], [3, 4, 5, 6]], mask=[[0, 1, 0, 1], [1, 1, 1, 1]])
    assert proposed(MaxGram(), call, row=0) == [5]
    assert proposed(MaxGram(), call, row=1) == [4, 5, 6]


def test_no_match_across_the_junction() -> None:
    call = StandInCall([[3, 4, 2, 3]], sources=[[1, 2]])
    assert longest_match([1, 2], [3, 4, 2, 3], []) == (1, True, 0)
    assert proposed(MaxGram(), call) == [4, 2, 3, 4, 2, 3, 4, 2, 3, 4]
    assert proposed(MaxGram(min_match=2), call) == []
    assert proposed(MaxGram(), StandInCall([[5, 1]], sources=[[1, 2]])) == [2]


def test_rows_do_not_see_each_other() -> None:
    generator, drafter = random.Random(0), MaxGram()
    texts = [word(generator, 3, 20, 1) for _ in range(4)]
    call = StandInCall(texts)
    for _ in range(20):
        paths = [word(generator, 3, 3) for _ in texts]
        contexts = [call.context(row, path) for row, path in enumerate(paths)]
        drafts = drafter.propose(contexts, [Budget(row, row) for row in range(4)])
        for row, draft in enumerate(drafts):
            assert list(draft.tokens) == paths[row] + (expected([], texts[row], paths[row], row) if row else [])
            new = word(generator, 3, 2)
            call.texts[row].append(new)
            texts[row] = texts[row] + new


def test_calls_do_not_see_each_other() -> None:
    drafter = MaxGram()
    assert proposed(drafter, StandInCall([[1, 2, 3, 1]]))
    assert proposed(drafter, StandInCall([[4, 1]])) == []


def test_all_max_grams_of_a_cascade_share_one_index() -> None:
    call = StandInCall([[1, 2, 1]])
    assert proposed(MaxGram(), call) == proposed(MaxGram(depth=3), call)
    assert len(call.memos) == 1


def test_depth_and_room() -> None:
    call = StandInCall([[1, 2, 1]])
    assert proposed(MaxGram(), call, depth=4) == [2, 1, 2, 1]
    assert proposed(MaxGram(), call, depth=4, room=3) == [2, 1, 2]
    context = call.context(path=[2])
    assert MaxGram().propose([context], [Budget(0, 5)])[0] is context.draft
    assert MaxGram().propose([context], [Budget(5, 0)])[0] is context.draft


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]])
def test_nothing_is_known(text: list[int]) -> None:
    assert proposed(MaxGram(), StandInCall([text])) == []
    assert proposed(MaxGram(), StandInCall([text]), path=[9, 8]) == []


def test_nothing_follows_an_end_token() -> None:
    text = [1, 2, 0, 4, 1]
    assert proposed(MaxGram(), StandInCall([text], eos=[0])) == [2, 0]
    assert proposed(MaxGram(), StandInCall([text], eos=[0, 2])) == [2]
    assert proposed(MaxGram(), StandInCall([text], eos=[0]), path=[2, 0]) == []
    # A prompt may contain end tokens, and even end with one.
    assert proposed(MaxGram(), StandInCall([[0, 5, 0]], eos=[0])) == [5, 0]


# The paper's code (github lfsszd/CS-Drafting, csd/mag.py), defect by defect.


def test_prompt_and_text_are_one_history() -> None:
    """It searches the prompt twice in a row, and so finds the prompt's start after its end."""
    assert proposed(MaxGram(), StandInCall([[1, 5, 6, 7, 8]])) == []
    call = StandInCall([[1, 5, 6, 7, 8]])
    call.texts[0].append([9, 8])
    assert proposed(MaxGram(), call, depth=2) == [9, 8]


def test_the_latest_of_equal_matches_wins() -> None:
    """It takes the oldest."""
    assert proposed(MaxGram(), StandInCall([[5, 6, 30, 5, 6, 40, 5, 6]]), depth=1) == [40]


def test_never_more_than_asked() -> None:
    """It makes a second search with the whole length again: up to 16 tokens for 10."""
    generator = random.Random(0)
    for _ in range(300):
        assert len(proposed(MaxGram(), StandInCall([word(generator, 4, 40, 1)]), depth=10)) in (0, 10)


def test_a_match_is_always_followed_by_something() -> None:
    """It accepts a match at the very end, which gives nothing or crosses into another copy."""
    generator = random.Random(0)
    for _ in range(1000):
        source, text, path = word(generator, 3, 8), word(generator, 3, 8, 1), word(generator, 3, 3)
        call = StandInCall([text], sources=[source] if source else None)
        assert bool(proposed(MaxGram(), call, path)) == bool(longest_match(source, text, path)[0])


def test_unknown_tokens_are_not_continued_with_token_zero() -> None:
    """It has tables of fixed size in which an unseen token is followed by token 0."""
    table = BigramTable.build([[1, 2, 3]], 8)
    drafter = MaxGram(bigram=table)
    assert proposed(drafter, StandInCall([[5, 1]])) == [2, 3]
    assert proposed(drafter, StandInCall([[5, 6]])) == []
    assert proposed(drafter, StandInCall([[5, 63]])) == []


def test_bigrams_only_fill_where_nothing_matches(tmp_path) -> None:
    table = BigramTable.build([[1, 2, 3, 0, 4]], 8)
    table.save(tmp_path / "table.safetensors")
    drafter = MaxGram(bigram=tmp_path / "table.safetensors", min_match=2)
    assert drafter == MaxGram(bigram=table, min_match=2)
    assert hash(drafter) == hash(MaxGram(bigram=table, min_match=2))
    call = StandInCall([[6, 1, 7, 6, 1]], eos=[0])
    assert proposed(drafter, call, depth=2) == [7, 6]
    assert proposed(drafter, call, path=[1]) == [2, 3, 0]
    assert proposed(drafter, call, path=[1], depth=1) == [2]
    drafter.check(call)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token 7, but the target has only 7 tokens"):
        drafter.check(StandInCall([[1]], vocab=7))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["depth", "min_match"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        MaxGram(**{name: 0})


# Cost.


def histories(length: int) -> dict[str, list[int]]:
    generator, numbers = random.Random(0), np.random.default_rng(0)
    phrases = [word(generator, 500, 12, 2) for _ in range(300)]
    prose: list[int] = []
    while len(prose) < length:
        prose += phrases[min(299, int(numbers.zipf(1.3)) - 1)]
    return {
        "prose": prose[:length],
        "one token": [7] * length,
        "two tokens": word(generator, 2, length, length),
        "a loop": (list(range(50)) * length)[:length],
    }


@pytest.mark.parametrize("kind", ["prose", "one token", "two tokens", "a loop"])
@pytest.mark.parametrize("path", [(), (3, 1, 4, 1, 5)])
def test_a_proposal_costs_the_same_after_a_long_text(kind: str, path: tuple[int, ...]) -> None:
    def cost(length: int) -> float:
        tokens = histories(length + 200)[kind]
        return min(microseconds(MaxGram(), StandInCall([tokens[:length]]), tokens[length:], path) for _ in range(3))

    short, long = cost(256), cost(8192)
    print(f"MaxGram, {kind}, path of {len(path)}: {short:.1f} us after 256 tokens, {long:.1f} after 8192")
    assert long < 3 * short
    if kind == "prose":
        assert long < 60


def test_bounded_walks_still_find_a_true_match() -> None:
    """Where matches nest by the hundred, the search is cut short: what it finds may be less, never wrong."""
    generator = random.Random(0)
    for _ in range(200):
        text = [1] * generator.randint(70, 400) + word(generator, 2, 3) + [1] * generator.randint(0, 400)
        path = word(generator, 3, 6, 1)
        index = History()
        index.read(Text(torch.tensor(text)))
        state, length = index.find(path)
        last = index.automaton.recent[state]
        ending = text + path
        assert text[last + 1 - length : last + 1] == ending[len(ending) - length :]
        assert length >= min(longest_match([], text, path)[0], NEAR)


def test_reading_a_prompt() -> None:
    for kind, tokens in histories(8192).items():
        text, times = Text(torch.tensor(tokens)), []
        for _ in range(3):
            index, start = History(), time.thread_time()
            index.read(text)
            times.append(time.thread_time() - start)
        rate = len(tokens) / min(times)
        print(f"MaxGram reads {kind}: {rate:,.0f} tokens/s, {index.automaton.states / len(tokens):.2f} states a token")
        assert rate > 20_000
        assert index.automaton.states < 2 * len(tokens) + 2
