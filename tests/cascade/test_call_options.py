"""What a user meets first: `csdraft.Options`, and `generate` taught to one model or to all."""

from __future__ import annotations

import dataclasses
import json

import pytest

import csdraft
from csdraft import CascadeDrafter, MaxGram, Options, hub
from csdraft.cascade import options_of
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.match import Match
from csdraft.verifiers.rejection import Rejection
from tests.tiny import drafter_of, prompt, tiny

SAMPLED = {"do_sample": True, "max_new_tokens": 12}


def decoded(assistant=None, **keywords) -> list:
    return tiny("llama").generate(**prompt(), **SAMPLED, assistant=assistant or MaxGram(), **keywords).tolist()


# Options.


def test_options_are_the_keywords():
    """One object, or single keywords, or both: the same text."""
    options = Options(verifier="match", schedule="fixed", row_seeds=[7], graphs=False, reuse=False)
    wanted = decoded(verifier="match", schedule="fixed", row_seeds=[7], graphs=False, reuse=False)
    assert wanted == decoded(options=options)
    assert wanted == decoded(options=options, row_seeds=[7], verifier=Match())
    assert wanted == decoded(options=Options(row_seeds=[7]), schedule="fixed")
    unpatched = tiny("llama").generate(
        **prompt(), **SAMPLED, custom_generate=csdraft.decode, assistant=MaxGram(), options=options
    )
    assert unpatched.tolist() == wanted


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"verifier": "match"}, {"verifier": "rejection"}),
        ({"schedule": {"type": "fixed", "depth": 3}}, {"schedule": "fixed"}),
        ({"graphs": "auto"}, {"graphs": False}),
        ({"reuse": False}, {"reuse": True}),
        ({"strict": True}, {"strict": False}),
        ({"diagnose": False}, {"diagnose": True}),
        ({"row_seeds": [1]}, {"row_seeds": [2]}),
    ],
)
def test_an_option_given_twice_has_one_value(options, keywords):
    (name,) = keywords
    with pytest.raises(ValueError, match=rf"{name}=.* and options\.{name}=.*give one of them"):
        decoded(options=Options(**options), **keywords)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"graphs": "no"}, "graphs='no' is a str; it takes 'auto' or 'compile' or False"),
        ({"graphs": 0}, "graphs=0 is an int; it takes 'auto'"),
        ({"reuse": 1}, "reuse=1 .*True or False"),
        ({"verifier": "macth"}, "macth"),
        ({"row_seeds": 5}, "one whole number per row"),
        ({"row_seeds": [1.5]}, "one whole number per row"),
        ({"row_seeds": "12"}, "one whole number per row"),
    ],
)
def test_wrong_values_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
    with pytest.raises(ValueError, match=message):
        decoded(**wrong)


def test_options_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"give csdraft\.Options"):
        decoded(options={"strict": True})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


def test_a_cascade_has_options_that_a_call_may_change():
    cascade = CascadeDrafter([MaxGram()], 4, options=Options(strict=True, reuse=False, verifier="rejection"))
    assert (cascade.verifier, cascade.options) == (Rejection(), Options(strict=True, reuse=False))
    own = {"verifier": "rejection", "schedule": "cost_model"}
    assert options_of(cascade, Options(strict=False)) == Options(strict=False, reuse=False, **own)
    with pytest.raises(ValueError, match=r"verifier=.* and options\.verifier="):
        CascadeDrafter([MaxGram()], 4, verifier="block", options=Options(verifier="rejection"))
    with pytest.raises(ValueError, match="seeds belong to one call"):
        CascadeDrafter([MaxGram()], 4, options=Options(row_seeds=[1]))


class Failing(MaxGram):
    """Fails at its first draft."""

    def propose(self, contexts, budgets):
        raise RuntimeError("no draft today")


@pytest.mark.drafts_nothing
def test_strict_reaches_the_call_from_either_place():
    with pytest.raises(RuntimeError, match="no draft today"):
        decoded(Failing(), options=Options(strict=True))
    cascade = CascadeDrafter([Failing()], 4, options=Options(strict=True))
    with pytest.raises(RuntimeError, match="no draft today"):
        decoded(cascade)
    with pytest.warns(RuntimeWarning, match="no draft today"):
        decoded(cascade, strict=False)


def test_options_are_saved_with_a_cascade(tmp_path):
    options = Options(schedule="fixed", graphs=False, reuse=False, strict=True)
    cascade = CascadeDrafter([drafter_of("llama"), MaxGram()], 3, options=options)
    cascade.save_pretrained(tmp_path / "own")
    back = CascadeDrafter.from_pretrained(tmp_path / "own", target=tiny("llama"))
    assert (back.options, back.schedule) == (cascade.options, Fixed())
    assert back.options == Options(graphs=False, reuse=False, strict=True)
    document = json.loads((tmp_path / "own" / hub.DOCUMENT).read_text())
    assert document["options"] == {"graphs": False, "reuse": False, "strict": True}
    for wrong, message in (
        ({"rows": 1}, "options has no option 'rows'"),
        ({"strict": "yes"}, r"options\.strict='yes'"),
        ({"graphs": True}, r"options\.graphs=True"),
        ([], "options"),
    ):
        (tmp_path / "own" / hub.DOCUMENT).write_text(json.dumps(document | {"options": wrong}))
        with pytest.raises(ValueError, match=message):
            CascadeDrafter.from_pretrained(tmp_path / "own", target=tiny("llama"))


def test_a_cascade_without_options_is_saved_as_before(tmp_path):
    CascadeDrafter([MaxGram()], 3).save_pretrained(tmp_path / "plain")
    assert "options" not in json.loads((tmp_path / "plain" / hub.DOCUMENT).read_text())


def test_prepare_takes_graphs_from_options():
    quiet = {"slots": 64, "progress": lambda what, share: None}
    eager = csdraft.prepare(tiny("llama"), options=Options(graphs=False), **quiet)
    assert "graphs=False asks for it" in str(eager)
    cascade = CascadeDrafter([MaxGram()], 4, options=Options(graphs=False))
    assert "graphs=False asks for it" in str(csdraft.prepare(tiny("llama"), cascade, **quiet))
    with pytest.raises(ValueError, match=r"compile=True and options\.graphs='auto'"):
        csdraft.prepare(tiny("llama"), compile=True, options=Options(graphs="auto"), **quiet)
