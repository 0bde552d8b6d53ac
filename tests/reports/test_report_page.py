"""The report as a page: its sentence has the report's figures, its strip the tallies', and it needs nothing else."""

import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import pytest

from csdraft import CascadeDrafter, MaxGram, ModelDrafter, Report, decode
from csdraft.reports import page as page_module
from csdraft.reports.page import page
from csdraft.reports.report import Planned
from csdraft.reports.tally import Tally
from csdraft.reports.view import endings, sentence
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests.tiny import drafter_of, prompt, ragged_batch, tiny, tokenizer


def decoded(assistant, inputs=None, **options) -> Report:
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "schedule": Fixed()} | options
    asked = {**(inputs or prompt()), "assistant": assistant, "return_dict_in_generate": True}
    return tiny("llama").generate(**asked, **options).report


@pytest.fixture(scope="module")
def report() -> Report:
    return decoded(CascadeDrafter([ModelDrafter(drafter_of("llama"), name="small"), MaxGram()], k_matrix=[2, 4]))


class Cells(HTMLParser):
    """Counts the cells of the strip by level and whether they are filled; checks that nothing else is loaded."""

    def __init__(self):
        super().__init__()
        self.kept, self.lost, self.rounds, self.tags = Counter(), Counter(), 0, []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert not {"src", "href", "onclick", "onload"} & set(given)
        assert tag not in ("script", "link", "img", "iframe", "object")
        self.tags.append(tag)
        names = (given.get("class") or "").split()
        self.rounds += "round" in names
        if tag == "i" and names:
            (self.lost if "no" in names else self.kept)[int(names[0][1:])] += 1


def cells_of(report: Report) -> Cells:
    cells = Cells()
    cells.feed(page(report))
    return cells


@pytest.mark.parametrize("tree", [None, BestFirst(2, 6)], ids=["chain", "tree"])
def test_the_strip_counts_what_the_tally_counts(tree):
    """Drafted, and kept, by level; a block a round of each row."""
    drafter = ModelDrafter(drafter_of("llama", scale=0.3), depth=4, tree=tree)
    report = decoded(drafter, ragged_batch())
    cells, names = cells_of(report), report.level_names
    assert cells.rounds == report.rounds
    assert Counter({names[level]: n for level, n in cells.kept.items()}) == +report.target.accepted
    assert Counter({names[level]: n for level, n in (cells.kept + cells.lost).items()}) == +report.target.drafted
    assert cells.lost.total() > 0


def test_a_long_text_has_a_short_strip_and_says_what_is_left_out(report, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_ROUNDS", 2)
    monkeypatch.setattr(page_module, "MOST_CELLS", 3)
    cells = cells_of(report)
    assert cells.rounds == 2
    assert (cells.kept + cells.lost).total() <= 6
    assert f"and {report.rounds - 2} more round" in page(report)


def test_the_first_words_are_the_sentence(report):
    """Before any other text, in the page and in a notebook."""
    for shown in (page(report, tokenizer()), page(report, notebook=True)):
        body = re.sub(r"<(style|title)>.*?</\1>", "", shown, flags=re.DOTALL)
        words = re.findall(r">([^<>]+)<", body)
        assert unescape(next(word for word in words if word.strip())) == sentence(report)


def figures(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_sentence_says_what_the_report_says(report):
    """Nobody measured a plain step under a fixed schedule: then it claims no speed."""
    assert report.speedup is None
    said = sentence(report)
    assert f"{report.block_efficiency:.2f} tokens" in said
    assert "as fast" not in said
    name, accepted = report.target.accepted.most_common(1)[0]
    assert f"{100 * accepted / report.emitted:.1f}% of the text was drafted by {name}" in said
    ends = endings(report)
    assert sum(ends.values()) == report.rounds
    assert round(100 * max(ends.values()) / report.rounds, 1) in figures(said) or "of the time" in said


def test_the_speed_is_the_one_that_was_measured():
    """By the schedule's price of a plain step, or as the planner timed it; about as fast is no gain."""
    tally = Tally(rounds=10, emitted=30, drafted=Counter(a=30), tried=Counter(a=25), accepted=Counter(a=20))
    tally.outcomes[2, 3] = 10
    made = {"reviews": {"target": tally}, "seconds": 2.0, "tokens": [[1] * 30], "target_calls": 10}
    assert sentence(Report(**made, plain_seconds=3.0, compared_seconds=2.0)).startswith("About 1.50 times as fast")
    planned = Planned(["a"], [[3]], 3.0, 1.5, plain_seconds=0.1)
    assert sentence(Report(**made, planned=planned)).startswith("About 1.50 times as fast")
    assert sentence(Report(**made, plain_seconds=2.0, compared_seconds=2.0)).startswith("About as fast")
    assert sentence(Report(**made, plain_seconds=1.0, compared_seconds=2.0)).startswith("Slower than plain decoding")
    assert "a cheaper drafter" in sentence(Report(**made, drafting=1.0))
    assert "closer to the target" in sentence(Report(**{**made, "seconds": 0.0}))
    assert sentence(Report(calls=0)) == "Nothing was generated."


def test_a_schedule_that_measures_tells_the_speed():
    """Texts of one row only; several calls add up."""
    cascade = CascadeDrafter([drafter_of("llama"), MaxGram()])
    for _ in range(3):
        decoded(cascade, schedule="cost_model", max_new_tokens=48)
    known = cascade.report
    assert 0 < known.compared_seconds <= known.seconds
    assert known.speedup == known.plain_seconds / known.compared_seconds
    assert f"{known.plain_seconds:.2f} s instead of {known.compared_seconds:.2f} s" in page(known)
    assert decoded(cascade, ragged_batch(), schedule="cost_model").compared_seconds == 0


def test_plain_decoding_is_a_page_too():
    report = decoded(None, custom_generate=decode)
    assert "nothing was drafted" in sentence(report)
    assert cells_of(report).rounds == report.rounds


def test_what_could_be_markup_is_escaped(tmp_path):
    """Names and tokens are text, also where a quote would end an attribute."""
    evil = '<script>alert("1")</script>'

    class Evil:
        def decode(self, ids, **options):
            return evil * len(ids)

    drafter = ModelDrafter(drafter_of("llama"), depth=3, name=evil)
    report = decoded(drafter)
    report.to_html(tmp_path / "page.html", Evil())
    for shown in ((tmp_path / "page.html").read_text(encoding="utf-8"), report._repr_html_()):
        assert "<script" not in shown
        Cells().feed(shown)


def test_the_page_fits_a_phone_and_the_dark(report):
    shown = page(report)
    assert 'name="viewport"' in shown
    assert "prefers-color-scheme: dark" in shown
    assert shown.count("<table") == shown.count('<div class="scroll"><table')
    assert "url(" not in shown
    assert "@import" not in shown


def test_a_notebook_keeps_little_of_a_long_text(report, monkeypatch):
    monkeypatch.setattr(page_module, "IN_A_NOTEBOOK", 5)
    assert f"and {report.emitted - 5} more tokens" in page(report, notebook=True)
    assert "more tokens" not in page(report)


def test_reports_of_earlier_versions_are_read(report):
    """They lack the rounds' drafts: then there is no strip."""
    data = report.to_dict()
    for key in ("rejected", "drafting", "plain_seconds", "compared_seconds"):
        del data[key]
    old = Report.from_dict(data)
    assert (old.rejected, old.emitted, old.reviews) == ([], report.emitted, report.reviews)
    assert cells_of(old).rounds == 0


@pytest.mark.parametrize("rejected", [[[]], [[[[9, 1]]]], [[[[1, 0]]]]])
def test_rounds_that_do_not_fit_are_refused(report, rejected):
    rounds = len(report.lengths[0])
    data = report.to_dict() | {"rejected": [[*rejected[0], *[[]] * (rounds - 1)]] if rejected[0] else rejected}
    with pytest.raises(ValueError, match="rejected"):
        Report.from_dict(data)
