"""Reports: hand-counted rounds, sums that must agree, and the same numbers after merging, saving and showing."""

import json
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from csdraft import CascadeDrafter, ModelDrafter, release
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Drafter, Round, Verdict
from csdraft.decoding.output import RoundStreamer
from csdraft.reports.detokenizer import Detokenizer
from csdraft.reports.report import ModelUse, Report
from csdraft.reports.tally import Tally
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests.tiny import Scripted, drafter_of, prompt, ragged_batch, tiny, tokenizer

DEPTH = 4


def a_round(draft: Draft, accepted: list[int], next_token: int | None = 9, before: Draft | None = None) -> Round:
    before = before or Draft()
    context = SimpleNamespace(row=0, draft=before, tip=before.tip)
    return Round(context, draft, Verdict(accepted, next_token), 0, scores=None)


def decoded(assistant: Drafter, inputs=None, **options) -> Report:
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "schedule": Fixed()} | options
    inputs = inputs or prompt()
    return tiny("llama").generate(**inputs, assistant=assistant, return_dict_in_generate=True, **options).report


@pytest.fixture(scope="module")
def report() -> Report:
    return decoded(ModelDrafter(drafter_of("llama"), depth=DEPTH, name="small"))


@pytest.fixture(scope="module")
def nested() -> Report:
    cascade = CascadeDrafter(
        [ModelDrafter(drafter_of("llama"), name="medium"), ModelDrafter(drafter_of("llama", scale=0.3), name="small")],
        k_matrix=[[2, 3], [0, 2]],
    )
    return decoded(cascade)


# Counting.


def test_a_chain_by_hand():
    """Two of four kept: three were tried, the last never was."""
    tally = Tally()
    tally.add([a_round(Draft().extend([5, 6], 1).extend([7, 8], 2), [0, 1])])
    assert (tally.rounds, tally.emitted, tally.plain) == (1, 3, 0)
    assert tally.drafted == {1: 2, 2: 2}
    assert tally.tried == {1: 2, 2: 1}
    assert +tally.accepted == {1: 2}
    assert tally.by_depth == [(1, 1), (1, 1), (1, 0)]
    assert tally.own == 1


def test_a_text_that_ends_on_a_draft_token_tries_no_further():
    tally = Tally()
    tally.add([a_round(Draft.chain([5, 6, 7], 1), [0, 1], next_token=None)])
    assert (tally.emitted, tally.own) == (2, 0)
    assert tally.tried == tally.accepted == {1: 2}


def test_a_round_without_a_draft_is_plain():
    tally = Tally()
    tally.add([a_round(Draft(), [])])
    assert (tally.rounds, tally.plain, tally.emitted, tally.by_depth) == (1, 1, 1, [])


def test_of_siblings_one_is_tried():
    """A kept sibling hides the others; where none is kept, the first stands for all."""
    tree = Draft((5, 6, 7, 8), (ROOT, ROOT, 1, 1), (1, 2, 1, 1), (0.5,) * 4)
    tally = Tally()
    tally.add([a_round(tree, [1])])
    assert tally.tried == {2: 1, 1: 1}
    assert +tally.accepted == {2: 1}


def test_what_the_context_brought_along_is_not_counted_again():
    before = Draft.chain([3, 4], 1)
    tally = Tally()
    tally.add([a_round(before.extend([5], 2), [2], before=before)])
    assert (tally.drafted, tally.accepted) == ({2: 1}, {2: 1})


def test_the_sums_agree(report):
    target = report.target
    assert report.emitted == 24 == sum(map(len, report.tokens)) == sum(map(sum, report.lengths))
    assert report.rounds == report.target_calls == len(report.lengths[0])
    assert report.block_efficiency == 24 / report.rounds > 1
    assert target.accepted.total() + target.own == report.emitted
    assert [sum(column) for column in zip(*target.by_depth, strict=True)] == [
        target.tried.total(),
        target.accepted.total(),
    ]
    assert Counter(report.level_names[level] for level in report.levels[0]) == target.accepted + Counter(
        target=target.own
    )


def test_the_models_are_counted(report):
    assert list(report.models) == ["target", "small"]
    for use in report.models.values():
        assert use.fed - use.rolled_back >= prompt()["input_ids"].shape[1]
        assert use.forwards > 0 < use.cache_bytes
    assert report.models["target"].forwards == report.target_calls
    assert 0 < report.loop_seconds < report.seconds


def test_a_batch_counts_rounds_by_row():
    """One forward serves all rows; block efficiency is of rows, so that a batch is its rows."""
    inputs = ragged_batch()
    report = decoded(ModelDrafter(drafter_of("llama"), depth=DEPTH), inputs)
    assert report.emitted == 24 * len(inputs["input_ids"])
    assert report.target_calls == max(map(len, report.lengths)) < report.rounds == sum(map(len, report.lengths))


@pytest.mark.parametrize("tree", [pytest.param(None, marks=pytest.mark.slow), BestFirst(2, 4)], ids=["chain", "tree"])
def test_a_row_is_drafted_for_in_a_batch_as_it_is_alone(tree):
    """Also when others have ended, and their places in the batch are taken."""
    target, inputs = tiny("llama"), ragged_batch((20, 3, 11, 17, 8, 14))
    cascade = CascadeDrafter([ModelDrafter(drafter_of("llama"), depth=4, tree=tree)], schedule=Fixed())
    asked = {"max_new_tokens": 40, "do_sample": False, "assistant": cascade, "reuse": False}
    target.generate(**inputs, **asked)
    together = cascade.last_report.lengths
    assert len(set(map(len, together))) > 2, "rows end at different times"
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, -length:] for name, value in inputs.items()}
        target.generate(**alone, **asked)
        assert cascade.last_report.lengths[0] == together[row], row


def test_the_peak_of_the_cache_is_kept_when_rows_end():
    """A cache that was repacked for the last row had been larger."""
    inputs, model = ragged_batch((20, 20, 20, 20)), tiny("llama")
    release(model)  # a larger cache may wait for it
    rules = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    texts = model.generate(**inputs, **rules).tolist()
    helped = Scripted(texts=[*texts[:3], [3] * 60], wrong=0.0)  # the last row gets no help and stays behind
    cascade = CascadeDrafter([helped], schedule=Fixed())
    model.generate(**inputs, **rules, assistant=cascade)
    lengths, four = cascade.report.lengths, cascade.report.models["target"].cache_bytes
    assert len(lengths[3]) > 3 * len(lengths[0])
    model.generate(**{name: value[:1] for name, value in inputs.items()}, **rules, assistant=cascade)
    assert four == 4 * cascade.last_report.models["target"].cache_bytes


def test_inner_reviewers_are_reported(nested):
    assert list(nested.reviews) == ["target", "medium"]
    inner = nested.reviews["medium"]
    assert set(inner.drafted) == {"small"}
    assert inner.rounds == nested.models["medium"].forwards
    assert set(nested.target.drafted) <= {"medium", "small"}


def test_what_had_no_room_is_reported(nested):
    """Near its end a text has less room than the K matrix asks for."""
    assert nested.cut > 0


def test_levels_without_a_name_have_distinct_ones():
    cascade = CascadeDrafter([drafter_of("llama"), drafter_of("llama", scale=0.3)], k_matrix=[2, 2])
    assert decoded(cascade).level_names == ["target", "LlamaForCausalLM", "LlamaForCausalLM 2"]


def test_a_failure_is_reported():
    class Broken(Drafter):
        def propose(self, contexts, budgets):
            raise RuntimeError("out of ideas")

    with pytest.warns(RuntimeWarning, match="out of ideas"):
        report = decoded(Broken())
    assert report.failures == {"RuntimeError: out of ideas": 1}
    assert report.plain_rounds == report.rounds == 24
    assert "out of ideas" in str(report)


# Accumulating and saving.


def test_merging_adds_counts_and_keeps_the_last_text(report, nested):
    both = report + nested
    assert both.calls == 2
    assert both.emitted == report.emitted + nested.emitted
    assert both.rounds == report.rounds + nested.rounds
    assert both.seconds == report.seconds + nested.seconds
    assert both.models["small"].fed == report.models["small"].fed + nested.models["small"].fed
    assert both.tokens is nested.tokens
    assert (Report(calls=0) + report).to_dict() == report.to_dict()
    assert (report + Report(calls=0)).tokens == report.tokens


def test_an_accumulated_report_does_not_grow(report):
    total = sum([report] * 50, Report(calls=0))
    assert total.emitted == 50 * report.emitted
    assert len(json.dumps(total.to_dict())) < 1.2 * len(json.dumps(report.to_dict()))


def test_a_cascade_accumulates():
    cascade = CascadeDrafter([drafter_of("llama")], k_matrix=3)
    first, second = decoded(cascade), decoded(cascade)
    assert cascade.report.calls == 2
    assert cascade.report.emitted == first.emitted + second.emitted


def test_saved_and_loaded(report, nested, tmp_path):
    for original in (report, nested, report + nested, Report(calls=0)):
        original.save(tmp_path / "report.json")
        assert Report.load(tmp_path / "report.json") == original


@pytest.mark.parametrize("data", [{}, {"csdraft_report": 99}, []])
def test_what_is_no_report_is_refused(data):
    with pytest.raises(ValueError, match="csdraft_report"):
        Report.from_dict(data)


# Showing.


def test_the_terminal_has_a_hundred_columns(report, nested):
    long = "a-drafter-whose-name-goes-on-and-on-" * 4
    tally = Tally(10**6, 0, 10**7, Counter({long: 10**8}), Counter({long: 10**7}), Counter({long: 10**6}))
    tally.outcomes[30, 40] = 10**6
    models = {"target": ModelUse(long, 10**7, 10**9, 10**8, 12345.0, 10**12)}
    wide = Report(3, 10**6, 10**7, 98765.0, {"target": tally, long: tally}, models, Counter({long: 3}))
    for shown in (report, nested, wide, Report(calls=0)):
        assert max(map(len, str(shown).splitlines())) <= 100


def test_a_long_sentence_is_on_two_lines(report):
    why = "drafts of 12 without the first stage pay: 1.7 tokens a step at 1.1 steps' cost; " * 2
    said = str(replace(report, why=why.strip()))
    assert " ".join(why.split()) in " ".join(said.split())


def test_the_terminal_says_what_matters(report):
    text = str(report)
    for words in (f"block efficiency {report.block_efficiency:.2f}", "small", "target itself", "rolled back", "█"):
        assert words in text


class Page(HTMLParser):
    """Checks that every tag is closed, and collects the text in `pre`."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], "", []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "pre" in self.open else ""


def test_the_page_holds_the_text_and_needs_nothing_else(report, tmp_path):
    report.to_html(tmp_path / "page.html", tokenizer())
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.open == [] == page.links
    assert page.text == tokenizer().decode(report.tokens[0])


def test_without_a_tokenizer_the_page_shows_ids(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.split() == [str(token) for token in report.tokens[0]]


def test_a_notebook_gets_the_tables(report):
    page = Page()
    page.feed(report._repr_html_())
    assert page.open == []


# Streams.


def test_a_round_streamer_gets_rounds():
    class Collector(RoundStreamer):
        def __init__(self):
            self.levels, self.tokens = [], []

        def put(self, value):
            pass

        def put_round(self, finished):
            self.tokens += finished.tokens
            self.levels += finished.levels

        def end(self):
            self.ended = True

    streamer = Collector()
    report = decoded(ModelDrafter(drafter_of("llama"), depth=DEPTH), streamer=streamer)
    assert (streamer.tokens, streamer.levels) == (report.tokens[0], report.levels[0])
    assert streamer.ended


def test_what_a_streamer_takes_is_not_the_calls():
    """It would take as long behind plain decoding: otherwise a slow reader makes any drafter slow."""
    taken = []

    class Slow(RoundStreamer):
        def put(self, value):
            pass

        def put_round(self, finished):
            began = time.perf_counter()
            time.sleep(0.03)
            taken.append(time.perf_counter() - began)

        def end(self):
            pass

    began = time.perf_counter()
    report = decoded(ModelDrafter(drafter_of("llama"), depth=DEPTH), streamer=Slow())
    assert len(taken) == report.rounds
    assert report.seconds <= time.perf_counter() - began - sum(taken)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["plain", "naïve — 日本語 🙂🙃!", ""])
def test_pieces_never_hold_half_a_character(text):
    byte_level = byte_tokenizer()
    pieces = Detokenizer(byte_level)
    found = [pieces.push(token) for token in byte_level(text)["input_ids"]]
    assert "".join(found) == text
    assert pieces.flush() == ""


def test_what_stays_incomplete_is_flushed():
    byte_level = byte_tokenizer()
    pieces = Detokenizer(byte_level)
    assert [pieces.push(token) for token in byte_level("é")["input_ids"][:1]] == [""]
    assert pieces.flush() == "\ufffd"
