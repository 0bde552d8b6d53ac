"""An EAGLE-3 head drafts what a forward without any cache would, and whatever it drafts, the target's text stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import csdraft
from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.decoding import feature_session
from csdraft.drafters.translated import Translated
from csdraft.drafters.vertical import Vertical
from csdraft.trainers.students import make_student
from csdraft.trees.best_first import BestFirst
from tests.heads.learned import PROMPTS, learned, naive, new_head, target, texts
from tests.heads.spied import FIXED, GREEDY, LONG, SAMPLED, Spied, written, wrong_parent, wrong_target
from tests.tiny import CAUSAL, noisy, ragged_batch, tiny, tokenizer


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tree", [None, BestFirst(3, 9)], ids=["chain", "tree"])
def test_drafts_are_those_of_a_naive_forward(rows, tree):
    """Features dropped at random between rounds change nothing but speed."""
    kept, dropped = (Spied(learned(), tree=tree, forget=forget) for forget in (False, True))
    plain = target().generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **LONG)
    assert torch.equal(written(kept, rows, **LONG), plain)
    assert torch.equal(written(dropped, rows, **LONG), plain)
    assert kept.drafts == dropped.drafts
    assert len(kept.errors) > 20
    assert max(kept.errors + dropped.errors) < 1e-4


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_variants_of_published_heads(flag):
    spied = Spied(learned(30, **{flag: True}), tree=BestFirst(2, 6))
    written(spied, **GREEDY)
    assert max(spied.errors) < 1e-4


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (feature_session, "_parents", wrong_parent),
        (feature_session.FeatureSession, "_of_target", wrong_target),
        (feature_session.FeatureSession, "_keep", feature_session.Session._keep),
    ],
)
def test_a_feature_of_the_wrong_position_is_found(monkeypatch, owner, name, mutant):
    """Of the node above the parent, of the token before, or the head's own where the target's is there."""
    monkeypatch.setattr(owner, name, mutant)
    spied = Spied(learned(), tree=BestFirst(3, 9))
    written(spied, **GREEDY)
    assert max(spied.errors) > 1e-3


def drafters() -> dict[str, Any]:
    head, small = learned(), noisy(target(), 0.3)
    return {
        "chain": ModelDrafter(head),
        "tree": ModelDrafter(head, tree=BestFirst(3, 12)),
        "level": CascadeDrafter([head, MaxGram()]),
        "reviewed": CascadeDrafter([small, head, MaxGram()]),
        "reviewer": Vertical(head, MaxGram()),
    }


@pytest.mark.parametrize("name", ["chain", "tree", "level", "reviewed", "reviewer"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_is_the_targets(name, rows):
    inputs = ragged_batch(PROMPTS[:rows])
    plain = target().generate(**inputs, pad_token_id=0, **GREEDY)
    assert torch.equal(written(drafters()[name], rows, **GREEDY), plain)
    seeds = {**SAMPLED, "row_seeds": SAMPLED["row_seeds"][:rows]}
    assert torch.equal(written(drafters()[name], rows, **seeds), written(MaxGram(), rows, **seeds))


def test_it_has_learned_to_draft():
    """Else the tests above would show little: no token of a draft would ever become text."""
    out = written(ModelDrafter(learned()), return_dict_in_generate=True, **GREEDY)
    assert out.report.block_efficiency > 1.5
    assert {token for row in texts().tolist() for token in row} - set(learned().drafted.tolist())


def test_tokens_outside_the_draft_vocabulary_have_probability_0():
    head, outside = learned(), set(range(97)) - set(learned().drafted.tolist())
    logits, _ = naive(head, texts()[0, :20].tolist(), [])
    assert logits.softmax(-1)[sorted(outside)].max() == 0
    spied = Spied(head, tree=BestFirst(4, 16))
    written(spied, **SAMPLED)
    assert not outside & {token for _, tokens, _ in spied.drafts for token in tokens}


def test_unrolled_steps_are_what_drafting_computes():
    """Two texts in a row, which do not see each other: each step from each entry against a naive forward."""
    head, (first, second) = new_head(), (texts()[0, :9].tolist(), texts()[5, :7].tolist())
    ids = torch.tensor([first + second])
    positions = torch.tensor([[*range(9), *range(7)]])
    with torch.no_grad():
        states = [target()(torch.tensor([text]), output_hidden_states=True).hidden_states for text in (first, second)]
        features = head.fuse({tap: torch.cat([own[tap] for own in states], 1) for tap in head.taps})
        steps = list(head.unrolled(ids, positions, features, 3))
    for text, start in ((first, 0), (second, 9)):
        for entry in range(len(text) - 1):
            for step in range(3):
                if entry + 1 + step < len(text):
                    path = text[entry + 2 : entry + 2 + step]
                    _, wanted = naive(head, text[: entry + 2], path)
                    assert torch.allclose(steps[step][0, start + entry], wanted, atol=1e-4)


def test_a_processor_that_allows_no_drafted_token_does_no_harm():
    outside = sorted(set(range(97)) - set(learned().drafted.tolist()))
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: outside}
    inputs = ragged_batch(PROMPTS)
    plain = target().generate(**inputs, pad_token_id=0, **GREEDY, **allowed)
    assert torch.equal(written(ModelDrafter(learned()), **GREEDY, **allowed), plain)
    drawn = {**SAMPLED, "verifier": "rejection"}
    assert not set(written(ModelDrafter(learned()), **drawn, **allowed)[:, 20:].flatten().tolist()) - {0, *outside}


@pytest.mark.parametrize("policy", ["cost_model", "heuristic", "confidence", "entropy", "bandit"])
def test_every_schedule_drives_it(policy):
    inputs = ragged_batch(PROMPTS)
    plain = target().generate(**inputs, pad_token_id=0, **GREEDY)
    how, tree = {**FIXED, "schedule": policy}, ModelDrafter(learned(), tree=BestFirst(2, 6))
    for assistant in (ModelDrafter(learned()), CascadeDrafter([tree, MaxGram()])):
        assert torch.equal(target().generate(**inputs, assistant=assistant, **how, **GREEDY), plain)


def test_a_plan_and_what_is_prepared_take_a_head_in():
    cascade = CascadeDrafter([learned(), MaxGram()], k_matrix="auto")
    inputs = {"input_ids": ragged_batch((11,))["input_ids"]}
    plain = target().generate(**inputs, pad_token_id=0, **GREEDY)
    assert torch.equal(target().generate(**inputs, assistant=cascade, strict=True, pad_token_id=0, **GREEDY), plain)
    ready = csdraft.prepare(target(), ModelDrafter(learned()), slots=64, progress=lambda what, share: None)
    assert "no graphs on cpu" in ready.why_not_captured["Eagle3"]
    assert all(len(model.costs) == 7 for model in ready.models)  # 1, 2, 4, ... 64 tokens
    csdraft.release()


def test_a_head_cannot_be_translated(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    drafter = Translated(ModelDrafter(learned()), str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match="reads hidden states of the target"):
        target().generate(**ragged_batch(PROMPTS), assistant=drafter, **FIXED, **GREEDY)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_head_can_be_made_for_every_family(family):
    model: Any = tiny(family)
    head = make_student(model, init={"eagle3": {"layers": [0, 1, 2]}}).eval()
    inputs = ragged_batch(PROMPTS)
    plain = model.generate(**inputs, pad_token_id=0, **GREEDY)
    assert torch.equal(model.generate(**inputs, assistant=ModelDrafter(head), **FIXED, **GREEDY), plain)
