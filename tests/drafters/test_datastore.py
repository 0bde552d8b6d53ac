"""The datastore: found by brute force, kept unchanged on disk, built by its script; its drafts and its texts."""

from __future__ import annotations

import json
import random
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from csdraft.decoding.interfaces import Budget
from csdraft.drafters.datastore import Datastore
from csdraft.tables.corpus import SPAN, CorpusIndex
from tests import tiny
from tests.drafters.quoting import draws, quotes
from tests.drafters.standin import StandInCall, microseconds

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_datastore.py"


def words(generator: random.Random, alphabet: int, most: int, least: int = 0) -> list[int]:
    return [generator.randrange(alphabet) for _ in range(generator.randint(least, most))]


def matches(documents: list[list[int]], tail: list[int]) -> tuple[int, list[list[int]]]:
    """Length of the longest match that something follows, and all that follows it, place by place."""
    for length in range(min(SPAN, len(tail)), 0, -1):
        word = tail[-length:]
        found = [d[i:] for d in documents for i in range(length, len(d)) if d[i - length : i] == word]
        if found:
            return length, found
    return 0, []


@pytest.mark.parametrize("alphabet", [1, 2, 4, 30])
def test_the_longest_match_and_all_its_places(alphabet: int, tmp_path) -> None:
    generator = random.Random(alphabet)
    for number in range(30):
        documents = [words(generator, alphabet, 60) for _ in range(generator.randint(1, 6))] + [[0, 0]]
        index = CorpusIndex.build(documents)
        if number % 2:
            index.save(tmp_path / "index.safetensors")
            index = CorpusIndex.load(tmp_path / "index.safetensors")
        for _ in range(40):
            tail, least, depth = words(generator, alphabet, 30), generator.randint(1, 3), generator.randint(1, 12)
            length, found = matches(documents, tail)
            matched, first, last = index.find(tail, least)
            assert matched == (length if length >= least else 0)
            ahead = index.continuations(first, last, depth, 10_000)
            assert sorted(ahead) == sorted(f[:depth] for f in found if length >= least)


def test_a_sample_is_spread_evenly() -> None:
    index = CorpusIndex.build([[5, 6, *[1] * (i % 3), i + 10] for i in range(90)])
    matched, first, last = index.find([5, 6], 1)
    assert (matched, last - first) == (2, 90)
    sample = index.continuations(first, last, 4, 30)
    assert len(sample) == 30
    assert len({tuple(one) for one in sample}) == 30
    assert index.continuations(first, last, 4, 90) == index.continuations(first, last, 4, 5000)


def test_a_saved_index_is_the_same(tmp_path) -> None:
    generator = random.Random(0)
    index = CorpusIndex.build([words(generator, 9, 400) for _ in range(9)])
    index.save(tmp_path / "index.safetensors")
    loaded = CorpusIndex.load(tmp_path / "index.safetensors")
    loaded.save(tmp_path / "copies" / "copy.safetensors")
    copy = CorpusIndex.load(tmp_path / "copies" / "copy.safetensors")
    for _ in range(100):
        tail = words(generator, 9, 10)
        found = index.find(tail, 1)
        assert found == loaded.find(tail, 1) == copy.find(tail, 1)
        assert index.continuations(*found[1:], 9, 9) == copy.continuations(*found[1:], 9, 9)
    assert (len(copy), copy.largest, copy.nbytes) == (len(index), 8, index.nbytes)
    assert index.nbytes <= 8 * len(index)
    (tmp_path / "other").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"not a safetensors file.*build_datastore\.py"):
        CorpusIndex.load(tmp_path / "other")


def test_what_cannot_be_indexed() -> None:
    with pytest.raises(ValueError, match="no document has two tokens"):
        CorpusIndex.build([[1], [], [2]])
    with pytest.raises(ValueError, match="token -1"):
        CorpusIndex.build([[1, -1]])


# Drafts.


def drafted(drafter: Datastore, text: list[int], depth: int = 10, eos: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The paths from the root to every node, in the order of the nodes."""
    call = StandInCall([text], eos=eos)
    (draft,) = drafter.propose([call.context()], [Budget(depth, depth)])
    assert draft.probs is None
    return [tuple(draft.tokens[i] for i in draft.path(node)) for node in range(len(draft))]


def test_the_most_frequent_nodes() -> None:
    generator = random.Random(0)
    for _ in range(100):
        documents = [words(generator, 3, 60, 2) for _ in range(3)]
        tail, depth, nodes = words(generator, 3, 4, 1), generator.randint(1, 5), generator.randint(1, 12)
        _, found = matches(documents, tail)
        counts = Counter(tuple(f[:n]) for f in found for n in range(1, min(depth, len(f)) + 1))
        drafter = Datastore(CorpusIndex.build(documents), nodes=nodes, min_match=1, matches=10_000)
        paths = drafted(drafter, tail, depth)
        assert len(set(paths)) == len(paths) == min(nodes, len(counts))
        best = sorted(counts.values(), reverse=True)[:nodes]
        assert [counts[path] for path in paths] == best
        least = [len(path) for path in paths if counts[path] == best[-1]] if best else []
        left = [len(path) for path in counts if path not in paths and counts[path] == best[-1]]
        assert not left or max(least) <= min(left)


def test_nothing_follows_an_end_token() -> None:
    index = CorpusIndex.build([[1, 2, 3, 0, 4, 5], [1, 2, 6, 7]])
    assert set(drafted(Datastore(index), [1, 2], eos=(0,))) == {(3,), (3, 0), (6,), (6, 7)}
    call = StandInCall([[1, 2]], eos=[0])
    context = call.context(path=[3, 0])
    assert Datastore(index).propose([context], [Budget(5, 5)])[0] is context.draft
    (draft,) = Datastore(index).propose([call.context(path=[3])], [Budget(5, 5)])
    assert (draft.tokens, draft.parents) == ((3, 0), (-1, 0))


def test_options_are_checked() -> None:
    index = CorpusIndex.build([[1, 70, 3]])
    for name in ("depth", "nodes", "min_match", "matches"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Datastore(index, **{name: 0})
    with pytest.raises(ValueError, match="token 70, but the target has only 64 tokens"):
        Datastore(index).check(StandInCall([[1]]))  # type: ignore[arg-type]
    assert drafted(Datastore(index, min_match=2), [1]) == []


@draws
def test_the_text_does_not_depend_on_it(rows: int, how: dict) -> None:
    """With a corpus that has the text, and wrong ways beside it."""

    def make(prompt: list[int], text: list[int]) -> Datastore:
        branches = [prompt + text, prompt + text[:4] + [50, 51, 52], prompt + text[:2] + [53]]
        return Datastore(CorpusIndex.build(branches * 3))

    quotes(rows, how, make)


def test_the_script_builds_it(tmp_path, monkeypatch, capsys) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("abcabd", "xyz")))
    arguments = ["--tokenizer", tmp_path / "tokenizer", "--source", tmp_path / "texts.jsonl"]
    arguments += ["--out", tmp_path / "store.safetensors"]
    monkeypatch.setattr(sys, "argv", ["build_datastore.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    a, b, c, d = (ord(letter) - ord("!") + 3 for letter in "abcd")
    drafter = Datastore(tmp_path / "store.safetensors", min_match=2)
    assert f"{len(drafter.corpus)} tokens" in printed.out  # type: ignore[arg-type]
    assert "100%" in printed.err
    assert {path[0] for path in drafted(drafter, [a, b])} == {c, d}


def test_a_proposal_costs_microseconds() -> None:
    generator = random.Random(0)
    phrases = [words(generator, 500, 12, 2) for _ in range(300)]
    prose = [token for _ in range(8000) for token in phrases[min(299, int(generator.paretovariate(0.5)) - 1)]]
    drafter = Datastore(CorpusIndex.build([prose[8000:]]), nodes=16)
    cost = min(microseconds(drafter, StandInCall([prose[:4000]], vocab=500), prose[4000:4200]) for _ in range(3))
    print(f"Datastore: {cost:.1f} us")
    assert cost < 500
