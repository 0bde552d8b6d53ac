"""Heads whose forwards are recorded and replayed, by the stand-in on the CPU: they draft as they do eagerly."""

import pytest
import torch

import csdraft
from csdraft import ModelDrafter
from csdraft.trees.best_first import BestFirst
from tests.decoding.tape import stand_in
from tests.heads.kinds import NAMES, learned, new
from tests.heads.learned import target, texts
from tests.tiny import fresh

EAGER = {"chimera", "clover2", "ctc", "dflash", "falcon", "hydra", "medusa", "parallel"}
"""Heads that ask the host what a forward is for: which output layer is next, whether text is read or a draft."""
FAST = ("eagle3", "medusa")
WANTED = {
    "max_new_tokens": 12,
    "do_sample": False,
    "pad_token_id": 0,
    "schedule": "fixed",
    "return_dict_in_generate": True,
}


@pytest.fixture
def readers(monkeypatch):
    yield from stand_in(monkeypatch)


@pytest.mark.parametrize("tree", [None, BestFirst(nodes=6)], ids=["chain", "tree"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in NAMES])
def test_replayed_heads_draft_the_same(readers, name, tree):
    head = learned(name)
    prompts = texts()[:2, :9].clone()
    prompts[1, :2] = 0
    drafter, mask = ModelDrafter(head, tree=tree), (prompts != 0).long()
    for rows in (1, 2):
        asked = {"inputs": prompts[:rows], "attention_mask": mask[:rows], **WANTED, "assistant": drafter}
        eager = target().generate(**asked, graphs=False)
        for _ in range(3):
            found = target().generate(**asked)
            assert torch.equal(found.sequences, eager.sequences)
            assert found.report.lengths == eager.report.lengths
    own = [reader for reader in readers if reader.taps == {0} and reader.graphs is not None]
    reasons = {reader.graphs.why_not for reader in own} - {None}
    assert bool(reasons) == (name in EAGER), reasons
    assert name in EAGER or any(reader.graphs.shapes for reader in own)


@pytest.mark.parametrize("name", NAMES)
def test_every_head_is_prepared_or_says_why_not(name):
    head = new(name)
    ready = csdraft.prepare(target(), ModelDrafter(head), slots=64, progress=lambda what, share: None)
    assert ready.models[0].costs
    assert bool(ready.models[1].costs) != ("what a forward of this head is for" in (ready.models[1].why_not or ""))
    assert bool(ready.models[1].costs) == (name in ("eagle", "eagle3", "fspad", "hass"))


def test_what_a_first_forward_leaves_on_a_target_drops_nothing(readers):
    """Asked for hidden states, transformers adds hooks for good; with a static cache, it notes the cache's length."""
    new_target, head = fresh("llama", num_hidden_layers=3), new("eagle3")
    csdraft.prepare(new_target, ModelDrafter(head), rows=1, slots=256, progress=lambda what, share: None)
    asked = {"inputs": texts()[:1, :9], "max_new_tokens": 12, "do_sample": False}
    static = new_target.generate(**asked, cache_implementation="static")
    found = new_target.generate(**asked, assistant=ModelDrafter(head), schedule="fixed", strict=True)
    assert torch.equal(found, static)
    assert len(readers) == 2
    assert len(readers[0].graphs.shapes) == 7


def test_a_head_can_be_prepared(readers):
    head = learned("eagle3")
    assert not csdraft.prepare(target(), ModelDrafter(head), rows=1, slots=256).why_not_captured
    recorded = {id(reader): len(reader.graphs.shapes) for reader in readers}
    asked = {"inputs": texts()[:1, :9], **WANTED, "assistant": ModelDrafter(head)}
    found = target().generate(**asked)
    assert {id(reader): len(reader.graphs.shapes) for reader in readers} == recorded  # nothing was left to record
    eager = target().generate(**asked, graphs=False)
    assert found.report.lengths == eager.report.lengths
    assert torch.equal(found.sequences, eager.sequences)
