"""Replay: a recorded text gives the rounds that its model gave, and tables say what came of it."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch

from benchmarks.replay import NO_CHOICE, NotRecorded, RecordedScores, Recording, replay
from benchmarks.replays import Yield, measure, read_answers, read_pairs, read_rounds, table
from csdraft import MaxGram, ModelDrafter, PromptLookup
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Drafter, Request, Round
from csdraft.decoding.processing import Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.metrics.intervals import bootstrap_ratio
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.lenient import Lenient
from tests.tiny import EOS, VOCAB, Scripted, drafter_of, prompt, tiny, tokenizer

NEW = 48


def recorded(new_tokens: int = NEW, seed: int = 0) -> Recording:
    """What the tiny model writes."""
    ids = prompt(seed=seed)["input_ids"]
    written = tiny("llama").generate(ids, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
    return Recording(tuple(written[: ids.shape[1]]), tuple(written[ids.shape[1] :]))


def replayed(recording: Recording, drafter: Drafter, **options):
    (report,) = replay([recording], drafter, VOCAB, [EOS], **options)
    return report


def scripted(recording: Recording, branches: int) -> Scripted:
    return Scripted([[*recording.prompt, *recording.output]], wrong=0.4, branches=branches)


@pytest.mark.parametrize("kind", ["max_gram", "prompt_lookup", "chain", "tree"])
def test_the_rounds_are_those_of_the_model(kind):
    recording = recorded()
    made = {"max_gram": MaxGram, "prompt_lookup": PromptLookup}
    make = made.get(kind) or (lambda: scripted(recording, 1 + (kind == "tree")))
    ids = prompt()["input_ids"]
    options = {"max_new_tokens": NEW, "do_sample": False, "schedule": Fixed(), "return_dict_in_generate": True}
    wanted = tiny("llama").generate(ids, assistant=make(), strict=True, **options).report
    found = replayed(recording, make())
    assert (found.tokens, found.levels, found.lengths) == (wanted.tokens, wanted.levels, wanted.lengths)
    assert found.target == wanted.target
    assert 0 < found.acceptance_rate < 1


class Astray(Drafter):
    """A wrong token, and below it what the text says next; the right token stands beside it, a leaf."""

    depth = 2

    def propose(self, contexts, budgets):
        (context,), text = contexts, RECORDING.prompt + RECORDING.output
        at = len(context.text)
        if at + 2 > len(text) or budgets[0].room < 2:
            return [context.draft]
        wrong, right, after = (text[at] + 1) % VOCAB, text[at], text[at + 1]
        level = context.call.level(self)
        return [Draft((wrong, right, after), (-1, -1, 0), (level,) * 3, (math.nan,) * 3)]


RECORDING = Recording(tuple(range(5, 15)), tuple(range(20, 31)))


def test_what_follows_a_token_that_was_never_written_is_never_kept():
    assert replayed(RECORDING, Astray()).lengths == [[2, 2, 2, 2, 2, 1]]


def test_a_view_knows_nothing_after_a_token_that_was_never_written():
    """Whatever rule asks: also of nodes that match never comes to."""
    chooser = TokenChooser(Processing([], 1), Stopping([]), Sampler(True, [0], VOCAB))
    draft = Draft((99, 20, 21, 21), (-1, -1, 0, 1), (1,) * 4, (math.nan,) * 4)
    text = Text(torch.tensor(RECORDING.prompt))
    view = RecordedScores(chooser, [*RECORDING.prompt, *RECORDING.output], Request(0, text, draft))
    assert [view.choice(node) for node in (-1, 0, 1, 2, 3)] == [20, NO_CHOICE, 21, NO_CHOICE, 22]
    assert view.probs(1).argmax() == 21
    with pytest.raises(NotRecorded, match="never written"):
        view.probs(2)


def test_a_text_that_ended_and_one_that_was_cut():
    ended = Recording((5, 6, 7), (8, 9, EOS))
    assert replayed(ended, MaxGram()).tokens == [[8, 9, EOS]]
    cut = Recording((5, 6, 5, 6, 5, 6), (5, 6, 5, 6))
    found = replayed(cut, MaxGram())
    assert found.tokens == [[5, 6, 5, 6]]
    assert max(round_ for (round_, _) in found.target.outcomes) == 3  # no more room than the limit left


class Harvesting(MaxGram):
    """Learns from the target's logits."""

    def observe(self, rounds: list[Round]) -> None:
        rounds[0].scores.logits  # noqa: B018 - to ask is what is tested


def test_what_was_not_recorded_is_refused():
    with pytest.raises(NotRecorded, match="logits"):
        replayed(recorded(), Harvesting())
    with pytest.raises(NotRecorded, match="runs a model"):
        replayed(recorded(), ModelDrafter(drafter_of("llama")))
    with pytest.raises(ValueError, match="need at least one"):
        Recording((), (3,))


def test_a_rule_that_leaves_the_text_is_noticed():
    class Lax(Lenient):
        def keeps(self, draft, node, scores, sampler):
            return next(iter(draft.children(node)), None)

    with pytest.raises(NotRecorded, match="left the recorded text"):
        replayed(recorded(), Scripted([[9] * 99], wrong=1.0), verifier=Lax())


# Files and tables.


def test_pairs_are_read_as_text_or_ids(tmp_path):
    made = tokenizer()
    rows = [{"prompt": "abc", "output": "def", "task": "letters"}, {"prompt": [5, 6], "output": [7]}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_pairs(tmp_path / "pairs.jsonl", made)
    assert (first.prompt, first.output) == (
        tuple(made("abc").input_ids),
        (*made("def", add_special_tokens=False).input_ids, EOS),
    )
    assert (first.task, second) == ("letters", Recording((5, 6), (7,)))


def test_answers_become_a_recording_a_turn(tmp_path):
    made = tokenizer()
    questions = [{"question_id": 1, "category": "coding", "turns": ["ab", "c"]}]
    questions += [{"question_id": 2, "category": "qa", "turns": ["d"]}]
    answers = [{"question_id": 1, "choices": [{"turns": ["xy", "z"], "new_tokens": [3, 1], "accept_lengths": [2, 2]}]}]
    answers += [{"question_id": 2, "choices": [{"turns": ["uvw"], "new_tokens": [4], "accept_lengths": [1, 3]}]}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with lzma.open(tmp_path / "answers.jsonl.xz", "wt") as file:
        file.write("\n".join(map(json.dumps, answers)))
    template = "{% for m in messages %}{{ m.content }}/{% endfor %}"
    found = read_answers(tmp_path / "questions.jsonl", tmp_path / "answers.jsonl.xz", made, template)
    assert [made.decode(r.prompt) for r in found] == ["ab/", "ab/xy/c/", "d/"]
    assert [r.output[-1] == EOS for r in found] == [True, False, True], "one token and no end of text: cut"
    assert [(r.task, r.group) for r in found] == [("multi-turn", "1"), ("multi-turn", "1"), ("qa", "2")]
    others = read_rounds(tmp_path / "questions.jsonl", tmp_path / "answers.jsonl.xz")
    assert others == [Yield("multi-turn", "1", 4, 2, 2), Yield("qa", "2", 4, 2, 2)]


def test_a_table_counts_rounds_not_texts():
    found = [Yield("a", "1", 30, 10, 20), Yield("a", "2", 10, 10, 0), Yield("b", "3", 8, 4, 4)]
    lines = table({"x": found}).split("\n")
    assert lines[2].startswith("| a | 2.00 [1.00, 3.00]")
    assert lines[3].startswith("| b | 2.00 [2.00, 2.00]")
    assert lines[4].startswith("| overall | 2.00 [")
    assert table({"x": found}, accepted=True).split("\n")[2].startswith("| a | 1.00 [0.00, 2.00]")


def test_measured_counts_are_those_of_the_reports():
    recordings = [recorded(), recorded(seed=1)]
    found = measure(recordings, PromptLookup(), VOCAB, [EOS])
    assert [each.emitted for each in found] == [len(r.output) for r in recordings]
    assert all(each.emitted - each.rounds <= each.accepted < each.emitted for each in found)


def test_a_ratio_of_sums_weighs_by_rounds():
    found = bootstrap_ratio([10, 1], [1, 10])
    assert found.median == pytest.approx(1.0)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(10.0))
