"""Auto: one tree of all that costs no model, whose size is chosen by price; kept, and saved, by target."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import csdraft
from csdraft.automatic import KEY
from csdraft.cascade import CascadeDrafter, as_drafter
from csdraft.decoding.interfaces import Context
from csdraft.drafters import auto
from csdraft.drafters.auto import Auto
from csdraft.drafters.lookahead import Lookahead
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.schedules.cost_model import CostModel
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.costs import Widths
from csdraft.tables.outputs import OutputTable
from csdraft.tables.rates import Copy, SourceRates
from tests import tiny
from tests.contracts.methods import adjacency

GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLED = {"do_sample": True, "max_new_tokens": 24, "temperature": 0.9, "top_k": 40}
PRICES = {"free": 0.0, "a tenth of a step": 0.1, "a step": 1.0}
"""What another token in the target's forward costs, in steps."""


def priced(monkeypatch: pytest.MonkeyPatch, slope: float) -> None:
    monkeypatch.setattr(Widths, "seconds", lambda self, width: 1 + slope * (width - 1))
    monkeypatch.setattr(Widths, "known", lambda self, width: True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "slope",
    [pytest.param(s, id=name, marks=[pytest.mark.drafts_nothing] * (s == 1)) for name, s in PRICES.items()],
)
def test_the_text_is_the_targets_whatever_forwards_cost(rows, slope, monkeypatch) -> None:
    inputs, target = tiny.inputs_of("llama", rows), tiny.fresh("llama")
    plain = target.generate(**inputs, **GREEDY)
    priced(monkeypatch, slope)
    seeds, drafted = list(range(rows)), 0
    sampled = target.generate(**inputs, **SAMPLED, assistant=csdraft.MaxGram(), schedule="fixed", row_seeds=seeds)
    for _ in range(2):  # with cold tables, and with warm ones
        how = {"assistant": "auto", "strict": True, "return_dict_in_generate": True}
        output = target.generate(**inputs, **GREEDY, **how)
        assert torch.equal(output.sequences, plain)
        assert torch.equal(target.generate(**inputs, **SAMPLED, **how, row_seeds=seeds).sequences, sampled)
        drafted += output.report.target.drafted.total()
    assert drafted > 0 if slope == 0 else True
    assert drafted == 0 if slope == 1 else True, "a step a token never pays"


def test_other_kinds_of_targets() -> None:
    inputs, target = tiny.inputs_of("t5", 2), tiny.fresh("t5")
    plain = target.generate(**inputs, **GREEDY)
    for schedule in ("fixed", "cost_model"):
        made = target.generate(**inputs, **GREEDY, assistant="auto", schedule=schedule, strict=True)
        assert torch.equal(made, plain)


def test_trees_of_free_forwards_are_larger(monkeypatch) -> None:
    sizes = {}
    for name, slope in PRICES.items():
        priced(monkeypatch, slope)
        known = Auto(adjacency=adjacency(), remember=False)
        inputs = tiny.inputs_of("llama")
        how = {"assistant": known, "schedule": CostModel(), "return_dict_in_generate": True}
        report = tiny.tiny("llama").generate(**inputs, **GREEDY, **how).report
        sizes[name] = report.target.drafted.total() / report.target.rounds
    assert sizes["free"] > 20 > sizes["a tenth of a step"]
    assert sizes["a step"] == 0


def grown(tokens: list[int], rates: SourceRates | None = None) -> tuple[auto.LikeliestTree, Context]:
    from tests.drafters.standin import StandInCall

    table = AdjacencyTable(64)
    table.update(np.arange(20), (np.arange(20)[:, None] + np.arange(8) + 20) % 64)
    context = StandInCall([tokens]).context()
    return auto.LikeliestTree(context, table, None, auto.Suffix().place(context), rates or SourceRates()), context


def test_a_small_tree_is_the_beginning_of_a_large_one() -> None:
    tokens = [2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7]
    large, context = grown(tokens)
    large.grow(31)
    assert large.chances == sorted(large.chances, reverse=True)
    assert len(set(zip(large.parents, large.tokens, strict=True))) == 31, "no node is there twice"
    for nodes in (1, 3, 7, 15):
        small, _ = grown(tokens)
        small.grow(nodes)
        assert (small.tokens, small.parents) == (large.tokens[:nodes], large.parents[:nodes])
        draft = small.draft(context, 20, nodes, 1)
        assert draft.tokens[draft.path(draft.tip)[0]] == 8, "the copy is the likeliest, and the draft ends below it"
    for depth in (1, 2, 5):
        assert len(large.draft(context, depth, 31, 1)) <= Auto(nodes=31).width(depth)
    shallow = large.draft(context, 1, 31, 1)
    assert set(shallow.parents) == {-1}
    assert 0 < len(shallow) < 31


def test_what_is_right_is_drafted_first() -> None:
    rates = SourceRates()
    kind = Copy.of(8, earlier=False, matched=3, successors=list(range(27, 35)))
    before = rates.chance(kind)
    for _ in range(200):
        rates.learn(29, kind, 8, list(range(27, 35)))
    assert rates.chance(kind) < 0.1 * before
    tree, _ = grown([5, 6, 7, 8, 9, 1, 5, 6, 7], rates)
    tree.grow(1)
    assert tree.tokens == [29], "the third successor, not the copy"


def test_guesses_are_judged_by_what_was_written_drafted_or_not() -> None:
    rates = SourceRates()
    tree, _ = grown([5, 6, 7, 8, 9, 1, 5, 6, 7], rates)
    kind, copied, _ = tree._guesses[-1]
    before = rates.chance(kind)
    tree.learn([copied])
    assert rates.chance(kind) > before
    assert copied == 8


def test_one_drafter_a_target() -> None:
    one, other = tiny.fresh("llama"), tiny.fresh("llama")
    kept = as_drafter("auto", one)
    assert kept is as_drafter("auto", one)
    assert as_drafter("auto", other) is not kept
    assert isinstance(as_drafter("auto"), Auto)
    tokens = one.generate(**tiny.inputs_of("llama"), **GREEDY, assistant="auto")[0].tolist()
    assert kept.adjacency.known(tokens[-3])
    assert len(kept.outputs) > 0
    assert kept.memory.entries()
    assert not as_drafter("auto", other).adjacency.known(tokens[-3])
    csdraft.prepare(other, "auto", slots=64)


@pytest.mark.parametrize("tokens", [120, 60])
@pytest.mark.parametrize("assistant", ["auto", Auto(), TokenRecycling(), Lookahead()])
def test_resized_token_embeddings_begin_new_tables(assistant, tokens) -> None:
    target, prompt = tiny.fresh("llama"), torch.arange(5, 12).repeat(2)[None]
    target.generate(prompt, **GREEDY, assistant=assistant)
    target.resize_token_embeddings(tokens)
    output = target.generate(prompt, **GREEDY, assistant=assistant, strict=True)
    assert torch.equal(output, target.generate(prompt, **GREEDY))


def test_it_is_gone_with_the_target() -> None:
    target = tiny.fresh("llama")
    target.generate(**tiny.inputs_of("llama"), **GREEDY, assistant="auto")
    kept = [weakref.ref(thing) for thing in (target, as_drafter("auto", target), OutputTable.of(target))]
    csdraft.release()
    del target
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_folder_of_that_name(tmp_path, monkeypatch) -> None:
    tiny.drafter_of("llama").save_pretrained(tmp_path / "auto")
    monkeypatch.chdir(tmp_path)
    assert isinstance(as_drafter("auto", tiny.tiny("llama")), Auto)
    assert as_drafter("./auto", tiny.tiny("llama")).models()


def test_saved_and_loaded(tmp_path) -> None:
    target, inputs = tiny.fresh("llama"), tiny.inputs_of("llama")
    plain = target.generate(**inputs, **GREEDY, assistant="auto")
    kept = as_drafter("auto", target)
    CascadeDrafter([kept], k_matrix=kept.depth).save_pretrained(tmp_path / "warm", target=target)
    target.save_pretrained(tmp_path / "target")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    cascade = CascadeDrafter.from_pretrained(tmp_path / "warm", target=again)
    (loaded,) = cascade.drafters
    assert np.array_equal(loaded.adjacency.successors, kept.adjacency.successors)
    assert loaded.outputs.outputs == kept.outputs.outputs
    assert torch.equal(again.generate(**inputs, **GREEDY, assistant=cascade, strict=True), plain)
    # Beside the target it is what "auto" starts from.
    for file in (tmp_path / "warm").iterdir():
        if file.name != "README.md":
            file.rename(tmp_path / "target" / file.name)
    warm = as_drafter("auto", AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    assert warm.nest is None
    assert warm.outputs.outputs == kept.outputs.outputs


def saved_target(folder: Path, drafter: Path, named: str | None = None):
    """A target in a folder, and a drafter's model in another; `named` is what the generation config says."""
    target = tiny.fresh("llama")
    if named is not None:
        setattr(target.generation_config, KEY, named)
    target.save_pretrained(folder)
    tiny.drafter_of("llama").save_pretrained(drafter)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("named", [None, "mine", "{}/mine"])
def test_a_drafter_of_the_targets_own_joins_in(named, tmp_path, monkeypatch) -> None:
    where = tmp_path / "target" / ("drafter" if named is None else "mine")
    target = saved_target(tmp_path / "target", where, named and named.format(tmp_path / "target"))
    loaded = []
    monkeypatch.setattr("csdraft.cascade.load_model", lambda *a, load=csdraft.cascade.load_model, **k: loaded.append(a) or load(*a, **k))  # noqa: E501 # fmt: skip
    inputs = tiny.inputs_of("llama", 3)
    plain = target.generate(**inputs, **GREEDY)
    for schedule in ("fixed", "cost_model", "cost_model"):
        how = {"schedule": schedule, "strict": True, "return_dict_in_generate": True}
        output = target.generate(**inputs, **GREEDY, assistant="auto", **how)
        assert torch.equal(output.sequences, plain)
        assert schedule != "fixed" or len(output.report.target.drafted) == 2, "both draft"
    assert len(loaded) == 1
    assert len(as_drafter("auto", target).stages()) == 2


def test_a_cascade_beside_the_target_joins_in(tmp_path) -> None:
    target = tiny.fresh("llama")
    cascade = CascadeDrafter([tiny.drafter_of("llama"), csdraft.MaxGram()], [[2, 3], [0, 2]], verifier="typical")
    cascade.save_pretrained(tmp_path / "target", target=target)
    target.save_pretrained(tmp_path / "target")
    target, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "target"), tiny.inputs_of("llama", 3)
    made = target.generate(**inputs, **GREEDY, assistant="auto", schedule="fixed", strict=True)
    assert torch.equal(made, target.generate(**inputs, **GREEDY)), "a verifier that loses nothing"
    assert [limit for _, limit in as_drafter("auto", target).stages()] == [2, 5, 25]


def test_errors_name_the_value(tmp_path) -> None:
    with pytest.raises(ValueError, match="nodes=0 of an Auto must be from 1 to"):
        Auto(nodes=0)
    with pytest.raises(ValueError, match="Auto got 'small' for a drafter"):
        Auto(drafter="small")  # type: ignore[arg-type]
    target = tiny.fresh("llama")
    setattr(target.generation_config, KEY, 5)
    with pytest.raises(ValueError, match=f"generation_config.{KEY}=5 is an int; give a path or Hub id"):
        target.generate(**tiny.inputs_of("llama"), **GREEDY, assistant="auto")
    setattr(target.generation_config, KEY, "suffix")
    with pytest.raises(ValueError, match="'suffix' is a drafter's type; give the path"):
        target.generate(**tiny.inputs_of("llama"), **GREEDY, assistant="auto")
    setattr(target.generation_config, KEY, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"generation_config.{KEY}='.*none': .*remove it"):
        target.generate(**tiny.inputs_of("llama"), **GREEDY, assistant="auto")
    with pytest.raises(ValueError, match="the adjacency table has 12 tokens, the target"):
        tiny.tiny("llama").generate(**tiny.inputs_of("llama"), **GREEDY, assistant=Auto(adjacency=AdjacencyTable(12)))


def test_nothing_known_costs_microseconds() -> None:
    from tests.drafters.standin import StandInCall, microseconds

    call = StandInCall([list(range(300))], vocab=1000)
    call.sampler = call.chooser.processing = type("Way", (), {"greedy": True, "temperature": 1.0})
    call.target = torch.nn.Linear(1, 1)
    drafter = Auto(remember=False)
    assert drafter.evidence(call.context()) == auto.NOTHING
    assert microseconds(drafter, call, range(300, 400)) < 200
