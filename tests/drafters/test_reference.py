"""Copying from reference documents: by brute force, to the end of a document, kept with a cascade; its texts."""

from __future__ import annotations

import random

import pytest

from csdraft import spec
from csdraft.drafters.reference import NEAR, Reference
from csdraft.tables.documents import DocumentTable
from tests import tiny
from tests.drafters.quoting import draws, quotes
from tests.drafters.standin import StandInCall, microseconds, proposed


def words(generator: random.Random, alphabet: int, most: int, least: int = 0) -> list[int]:
    return [generator.randrange(alphabet) for _ in range(generator.randint(least, most))]


def expected(documents: list[list[int]], ending: list[int], depth: int, min_match: int) -> list[int]:
    """What follows the last of the longest matches, in its document."""
    for length in range(len(ending), min_match - 1, -1):
        word = ending[len(ending) - length :]
        found = [d[i:] for d in documents for i in range(length, len(d)) if d[i - length : i] == word]
        if found:
            return found[-1][:depth]
    return []


@pytest.mark.parametrize("alphabet", [2, 3, 6])
def test_the_longest_match_is_copied(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(60):
        documents = [words(generator, alphabet, 12) for _ in range(generator.randint(1, 4))]
        least, call = generator.randint(1, 3), StandInCall([words(generator, alphabet, 9, 1)])
        drafter = Reference(documents, min_match=least)
        for _ in range(6):
            text, path, depth = call.texts[0].tokens, words(generator, alphabet, 4), generator.randint(1, 9)
            assert proposed(drafter, call, path, depth) == expected(documents, text + path, depth, least)
            call.texts[0].append(words(generator, alphabet, 4))


def test_only_the_end_of_a_prompt_is_read() -> None:
    document = list(range(10, 60))
    text = [*range(10, 20), *[1] * NEAR]
    assert proposed(Reference([document]), StandInCall([text])) == []
    assert proposed(Reference([document]), StandInCall([[*text, 10, 11]])) == list(range(12, 22))


def test_nothing_follows_an_end_token() -> None:
    drafter = Reference([[1, 2, 3, 0, 4, 5]])
    assert proposed(drafter, StandInCall([[1]], eos=[0])) == [2, 3, 0]
    assert proposed(drafter, StandInCall([[1]], eos=[0]), path=[2, 3, 0]) == []
    assert proposed(drafter, StandInCall([[1]])) == [2, 3, 0, 4, 5]


def test_texts_are_encoded() -> None:
    tokenizer = tiny.tokenizer()
    table = DocumentTable.encode(["abc", "", "cde"], tokenizer)
    assert table.tokens == tokenizer("abccde", add_special_tokens=False)["input_ids"]
    assert proposed(Reference(table), StandInCall([table.tokens[:1]], vocab=tiny.VOCAB)) == table.tokens[1:3]
    with pytest.raises(ValueError, match=r"is a text.*DocumentTable\.encode"):
        Reference(["abc"])  # type: ignore[arg-type]


def test_it_is_saved_with_a_cascade(tmp_path) -> None:
    drafter, tables = Reference([[1, 2, 3], [], [2, 5]], depth=7), {}
    written = spec.to_json(drafter, spec.Names({}, tables))
    ((name, table),) = tables.items()
    table.save(tmp_path / "documents.safetensors")
    loaded = spec.from_json("drafters", written, spec.Names({}, {name: str(tmp_path / "documents.safetensors")}))
    assert loaded.depth == 7
    for text in ([1], [2], [1, 2], [5], [3]):
        assert proposed(loaded, StandInCall([text])) == proposed(drafter, StandInCall([text]))
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Reference(tmp_path / "other")


def test_options_are_checked() -> None:
    for name in ("depth", "min_match"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Reference([[1, 2]], **{name: 0})
    with pytest.raises(ValueError, match="token 70, but the target has only 64 tokens"):
        Reference([[70]]).check(StandInCall([[1]]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document 1 has token -2"):
        Reference([[1], [-2]])


@draws
def test_the_text_does_not_depend_on_it(rows: int, how: dict) -> None:
    """With a document that has the text but for one token."""
    quotes(rows, how, lambda prompt, text: Reference([[*prompt, text[0], 50, *text[2:]]]))


def test_a_proposal_costs_the_same_with_long_documents() -> None:
    generator = random.Random(0)
    prose = words(generator, 300, 20_000, 20_000)

    def cost(length: int) -> float:
        drafter, call = Reference([prose[:length]]), StandInCall([prose[:200]], vocab=300)
        return min(microseconds(drafter, call, prose[200:400]) for _ in range(3))

    short, long = cost(500), cost(20_000)
    print(f"Reference: {short:.1f} us with 500 tokens, {long:.1f} with 20,000")
    assert long < 3 * short
