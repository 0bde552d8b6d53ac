"""Suffix decoding against its definition by brute force; the table of earlier outputs; its texts and its cost."""

from __future__ import annotations

import random
import sys
import threading

import pytest

from csdraft import Horizontal
from csdraft.decoding.interfaces import Budget
from csdraft.drafters.suffix import Suffix
from csdraft.schedules.fixed import Fixed
from csdraft.tables import speculation
from csdraft.tables.outputs import NEAR, OutputTable, Place
from csdraft.tables.speculation import Rule
from csdraft.tables.suffix_automaton import NOWHERE, START, SuffixAutomaton
from tests import tiny
from tests.drafters.quoting import draws, quotes
from tests.drafters.standin import StandInCall, microseconds, proposed


def words(generator: random.Random, alphabet: int, most: int, least: int = 0) -> list[int]:
    return [generator.randrange(alphabet) for _ in range(generator.randint(least, most))]


def places(text: list[int], word: list[int]) -> list[int]:
    """Where `word` ends in `text`."""
    return [end for end in range(len(word) - 1, len(text)) if text[end + 1 - len(word) : end + 1] == word]


def followers(text: list[int], word: list[int]) -> dict[int, list[int]]:
    """Places of what follows `word`, by token."""
    found: dict[int, list[int]] = {}
    for end in places(text, word):
        if end + 1 < len(text):
            found.setdefault(text[end + 1], []).append(end + 1)
    return found


def continued(text: list[int], word: list[int]) -> list[int]:
    """`word`, or its longest ending that something follows."""
    while word and not followers(text, word):
        word = word[1:]
    return word


# The automaton's counts.


@pytest.mark.parametrize("alphabet", [2, 3, 6])
def test_the_automaton_counts_and_places_as_a_search_does(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(60):
        text, automaton = words(generator, alphabet, 30, 1), SuffixAutomaton()
        cut = generator.randint(0, len(text))
        automaton.extend(text[:cut])
        automaton.extend(text[cut:])
        for start in range(len(text)):
            state = START
            for end in range(start, len(text)):
                state = automaton.step(state, text[end])
                word = text[start : end + 1]
                assert state != NOWHERE
                assert automaton.count[state] == len(places(text, word))
                assert automaton.recent[state] == places(text, word)[-1]
                after = followers(text, word)
                assert automaton.followed(state) == sum(map(len, after.values()))
                token, there, share = automaton.likeliest(state)
                if after:
                    assert token == max(after, key=lambda t: (len(after[t]), after[t][-1]))
                    assert share == len(after[token]) / automaton.followed(state)
                    assert automaton.recent[there] == after[token][-1]
                    shares = {way: share for share, way, _ in automaton.transitions(state)}
                    assert shares == {way: len(at) / automaton.followed(state) for way, at in after.items()}
                else:
                    assert share == 0


# The proposals.


def path_after(text: list[int], word: list[int], most: int, min_prob: float) -> tuple[list[int], float]:
    tokens: list[int] = []
    chance, score = 1.0, 0.0
    while len(tokens) < most and (word := continued(text, word)):
        after = followers(text, word)
        token = max(after, key=lambda t: (len(after[t]), after[t][-1]))
        chance *= len(after[token]) / sum(map(len, after.values()))
        if chance < min_prob:
            break
        tokens.append(token)
        score += chance
        word = [*word, token]
    return tokens, score


def expected(text: list[int], path: list[int], depth: int, drafter: Suffix) -> list[int]:
    """What the paper says: of all matches, the proposal with the highest score, the longest match first."""
    ending, best = text + path, ([], 0.0)
    for length in range(len(ending) - 1, 0, -1):
        word = ending[-length:]
        if followers(text, word):
            most = min(int(drafter.factor * length + drafter.offset + 1e-6), depth)
            tried = path_after(text, word, most, drafter.min_prob)
            if tried[1] > best[1] + 1e-12:
                best = tried
    return best[0]


@pytest.mark.parametrize("alphabet", [2, 3, 6])
@pytest.mark.parametrize("options", [{}, {"factor": 2.0, "min_prob": 0.3}, {"factor": 0.5, "offset": 3.0}])
def test_the_best_of_all_matches(alphabet: int, options: dict, monkeypatch) -> None:
    monkeypatch.setattr(speculation, "MOST_TRIED", 1000)
    generator, drafter = random.Random(alphabet), Suffix(**options)
    for _ in range(150):
        text, path, depth = words(generator, alphabet, 24, 1), words(generator, alphabet, 4), generator.randint(1, 12)
        assert proposed(drafter, StandInCall([text]), path, depth) == expected(text, path, depth, drafter)


def test_a_long_match_drafts_more() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert proposed(Suffix(), StandInCall([[*text, 20, 1]])) == [2]
    assert proposed(Suffix(), StandInCall([[*text, 20, 1, 2, 3]])) == [4, 5, 6]
    assert proposed(Suffix(offset=2), StandInCall([[*text, 20, 1, 2, 3]])) == [4, 5, 6, 7, 8]


def test_a_loop_goes_on_behind_the_text() -> None:
    assert proposed(Suffix(), StandInCall([[1, 2, 3] * 4]), depth=9) == [1, 2, 3] * 3


def test_nothing_follows_an_end_token() -> None:
    text = [1, 2, 3, 0, 4, 5, 9, 1, 2, 3]
    assert proposed(Suffix(), StandInCall([text])) == [0, 4, 5]
    assert proposed(Suffix(), StandInCall([text], eos=[0])) == [0]
    assert proposed(Suffix(nodes=9), StandInCall([text], eos=[0])) == [0]
    assert proposed(Suffix(), StandInCall([text], eos=[0]), path=[0]) == []


def test_trees_hold_the_likeliest_nodes() -> None:
    """Twice 5 6, once 5 7, once 8: chances 3/4, 1/2, 1/4, 1/4; the order of equals is free."""
    text = [1, 2, 3, 5, 6, 1, 2, 3, 5, 6, 1, 2, 3, 5, 7, 1, 2, 3, 8, 9, 1, 2, 3]
    call = StandInCall([text])
    for nodes, wanted in ((1, [5]), (2, [5, 6]), (3, None)):
        (draft,) = Suffix(nodes=nodes).propose([call.context()], [Budget(10, 10)])
        assert len(draft) == nodes
        assert wanted is None or list(draft.tokens) == wanted
    (draft,) = Suffix(nodes=4, factor=2, depth=2).propose([call.context(path=[])], [Budget(2, 2)])
    assert {draft.tokens[0]: draft.parents[0], draft.tokens[1]: draft.parents[1]} == {5: -1, 6: 0}
    assert set(draft.tokens[2:]) == {7, 8}
    assert draft.parents[draft.tokens.index(8)] == -1
    assert max(draft.depths) == 1
    sure = Suffix(nodes=4, factor=2, min_prob=0.3).propose([call.context()], [Budget(2, 2)])
    assert sure[0].tokens == (5, 6)


def test_trees_go_on_from_the_tip() -> None:
    call = StandInCall([[1, 2, 3, 4, 1, 2, 3, 5, 9, 1]])
    (draft,) = Suffix(nodes=4).propose([call.context(path=[2, 3])], [Budget(1, 1)])
    assert draft.tokens[:2] == (2, 3)
    assert set(draft.tokens[2:]) == {4, 5}
    assert draft.parents == (-1, 0, 1, 1)


@pytest.mark.parametrize("options", [{"depth": 0}, {"nodes": 0}, {"factor": -1.0}, {"min_prob": 0.0}])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Suffix(**options)


# Earlier outputs.

RULE = Rule(1.0, 0.0, 0.1, 16, None, frozenset())


def test_the_source_with_the_higher_score_wins() -> None:
    table = OutputTable()
    table.add([4, 5, 6, 7, 8, 9])
    known = Suffix(outputs=table)
    assert proposed(known, StandInCall([[40, 4, 5, 6]])) == [7, 8, 9]
    assert proposed(known, StandInCall([[6, 30, 31, 40, 4, 5, 6]])) == [7, 8, 9]
    assert proposed(known, StandInCall([[4, 5, 6, 30, 31, 32, 33, 40, 3, 4, 5, 6]])) == [30, 31, 32]  # equal: the text
    assert proposed(known, StandInCall([[40, 4]]), path=[5, 6]) == [7, 8, 9]
    assert proposed(Suffix(), StandInCall([[40, 4, 5, 6]])) == []


def test_matches_end_with_an_output() -> None:
    table = OutputTable()
    table.add([1, 2, 3])
    table.add([4, 5, 6])
    assert table.speculate([2, 3], RULE).tokens == []
    assert table.speculate([1, 2], RULE).tokens == [3]
    assert table.match([9, 4, 5]) == 2


def test_the_bound_is_respected_and_the_oldest_go_first() -> None:
    generator, table, added = random.Random(0), OutputTable(200), []
    for _ in range(100):
        output = words(generator, 50, 30, 1)
        added.append(output)
        table.add(output)
        assert len(table) <= 200
        kept = table.outputs
        assert added[-len(kept) :] == kept
    assert len(table) > 70
    table.add(range(1000))
    assert len(table) <= 200
    assert table.outputs[-1] == list(range(901, 1000))
    assert table.speculate([990, 991], RULE).tokens == [992, 993]


def test_nothing_is_taken_for_an_output() -> None:
    table = OutputTable(100)
    table.add([])
    assert len(table) == 0
    with pytest.raises(ValueError, match="token -3"):
        table.add([1, -3])
    with pytest.raises(ValueError, match="max_tokens=1"):
        OutputTable(1)


def test_a_loaded_table_proposes_the_same(tmp_path) -> None:
    generator, table = random.Random(0), OutputTable(300)
    for _ in range(40):
        table.add(words(generator, 6, 30, 1))
    table.save(tmp_path / "outputs.safetensors")
    loaded = Suffix(outputs=tmp_path / "outputs.safetensors").outputs
    assert isinstance(loaded, OutputTable)
    assert (loaded.outputs, loaded.max_tokens, loaded.largest) == (table.outputs, table.max_tokens, table.largest)
    assert len(loaded) == len(table) > 200
    drafted = 0
    for _ in range(300):
        tail = words(generator, 6, 12)
        assert table.speculate(tail, RULE) == loaded.speculate(tail, RULE)
        drafted += len(loaded.speculate(tail, RULE).tokens)
        assert table.match(tail) == loaded.match(tail)
    assert drafted > 300
    new = words(generator, 6, 30, 20)
    for one in (table, loaded):
        one.add(new)
    assert table.outputs == loaded.outputs
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        OutputTable.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("alphabet", [2, 4])
def test_a_place_stands_at_a_true_match_whatever_is_added(alphabet: int) -> None:
    """What a text's place says is what a search of that match says; if nothing is added, it is the longest."""
    generator, compared = random.Random(alphabet), 0
    for adding in (True, False):
        for _ in range(30):
            table, place, text = OutputTable(400), Place(), words(generator, alphabet, 20)
            for _ in range(4):
                table.add(words(generator, alphabet, 40, 1))
            for _ in range(20):
                matched = table.match(text, place)
                assert adding or matched == table.match(text) or matched > NEAR
                for automaton, state, length in place.matches.values():
                    found = automaton.walk(START, 0, text[len(text) - length :], 10**6)
                    assert found == (state, length)
                path = words(generator, alphabet, 3)
                if not adding and matched < NEAR - 6:
                    assert table.speculate(text, RULE, path, place) == table.speculate(text + path, RULE)
                    compared += 1
                text += words(generator, alphabet, 6)
                if adding:
                    table.add(words(generator, alphabet, 40, 1))
    assert compared > 100


def test_two_threads_share_a_table() -> None:
    table, failures, interval = OutputTable(4000), [], sys.getswitchinterval()

    def work(number: int) -> None:
        generator = random.Random(number)
        try:
            for _ in range(150):
                table.add([number, *words(generator, 8, 30, 10)])
                assert len(table.speculate(words(generator, 8, 20, 3), RULE).tokens) <= 16
                assert len(table) <= 4000
        except Exception as error:  # a thread's failure must reach the test
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in (10, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert not any(thread.is_alive() for thread in threads), "a walk in a torn automaton may never end"
    alone = OutputTable(4000)
    for number in (10, 11):  # each thread's outputs are whole, in their order, and the latest
        generator, mine = random.Random(number), []
        for _ in range(150):
            mine.append([number, *words(generator, 8, 30, 10)])
            words(generator, 8, 20, 3)
        kept = [output for output in table.outputs if output[0] == number]
        assert kept == mine[len(mine) - len(kept) :]  # none, if the other thread came last
    for output in table.outputs:  # and the automata are those of a table that one thread filled
        alone.add(output)
    for start in range(8):
        assert table.match([start]) == alone.match([start]) == 1


def test_the_texts_that_ended_are_taken_in_once() -> None:
    table, inputs = OutputTable(), tiny.inputs_of("llama", 3)
    drafter = Suffix(outputs=table)
    how = {"do_sample": False, "max_new_tokens": 12, "schedule": Fixed(), "strict": True}
    how["return_dict_in_generate"] = True
    first = tiny.tiny("llama").generate(**inputs, assistant=Horizontal((drafter, drafter), (3, 3)), **how)
    written = [row[20:].tolist() for row in first.sequences]
    written = [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in written]
    assert sorted(table.outputs) == sorted(written)
    second = tiny.tiny("llama").generate(**inputs, assistant=drafter, **how)
    assert second.sequences.tolist() == first.sequences.tolist()
    assert len(table.outputs) == 6
    assert second.report.target_calls < first.report.target_calls
    with pytest.raises(ValueError, match="one table for each tokenizer"):
        drafter.check(StandInCall([[1]], vocab=5))  # type: ignore[arg-type]


@draws
@pytest.mark.parametrize("nodes", [None, 12])
def test_the_text_does_not_depend_on_it(rows: int, how: dict, nodes: int | None) -> None:
    """With a table that knows the text up to a wrong token."""

    def make(prompt: list[int], text: list[int]) -> Suffix:
        table = OutputTable()
        table.add(prompt + text)
        table.add(prompt + text[:4] + [50, 51])
        return Suffix(outputs=table, nodes=nodes)

    quotes(rows, how, make, depth=6)


# Cost.


def test_a_proposal_costs_the_same_after_a_long_text() -> None:
    generator, table = random.Random(0), OutputTable()
    phrases = [words(generator, 500, 12, 2) for _ in range(300)]
    prose = [token for _ in range(1500) for token in phrases[min(299, int(generator.paretovariate(0.5)) - 1)]]
    table.add(prose[:4000])

    def cost(length: int) -> float:
        call = StandInCall([prose[:length]], vocab=500)
        return min(microseconds(Suffix(outputs=table), call, prose[length : length + 200]) for _ in range(3))

    short, long = cost(256), cost(8000)
    print(f"Suffix: {short:.1f} us after 256 tokens, {long:.1f} after 8000")
    assert long < 3 * short
