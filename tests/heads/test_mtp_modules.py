"""A target with several next-token modules: module k drafts token k, and the text is the target's."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.heads.kinds import mtp
from csdraft.heads.kinds.mtp import OWN, Modules
from csdraft.trees.best_first import BestFirst
from csdraft.trees.sampled import Sampled
from tests.heads import spied
from tests.heads.spied import (
    DRAWS,
    EVERY,
    FORMS,
    GREEDY,
    LONG,
    SAMPLED,
    Spied,
    each_way,
    wrong_parent,
    wrong_target,
)
from tests.heads.test_mtp import (
    folder,
    greedy,
    module_name,
    target,
    tensors_of,
    texts,
    without_cache,
    write,
    written,
)

FAMILY, COUNT = "deepseek_v3 of three", 3


@cache
def learned() -> Any:
    """A copy of the bound modules that have learned to draft what the target writes; tests must not change it."""
    made, ids = copy.deepcopy(OWN.bind(target(FAMILY))), texts(FAMILY)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        features = made.fuse({-1: target(FAMILY)(ids, output_hidden_states=True).hidden_states[-1]})
    made.mtp.requires_grad_(True)
    optimizer = torch.optim.AdamW(made.mtp.parameters(), 0.01)
    for _ in range(60):
        outputs = made(ids[:, 1:], features[:, :-1], positions[:, 1:] - 1).hidden_states[0][:, :-1, :-1]
        loss = torch.zeros(())
        for number, output in enumerate(outputs.split(outputs.shape[-1] // COUNT, -1)):
            logits = made.lm_head(output)[:, number:]
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2 + number :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False)


@pytest.fixture
def looked(monkeypatch) -> Any:
    """Makes a drafter that compares what it drafts with a forward without a cache."""
    monkeypatch.setattr(spied, "naive", lambda *given: without_cache(FAMILY, *given))
    return Spied


@torch.no_grad()
def theirs(text: Tensor) -> tuple[list[int], Tensor]:
    """What transformers' own model of the modules drafts, and (tokens, vocab) its logits."""
    model = mtp._read(target(FAMILY), torch.float32, torch.device("cpu")).eval()
    states = target(FAMILY)(text[None, :-1], output_hidden_states=True).hidden_states[-1]
    places = torch.arange(1, len(text))[None]
    drafted, logits, _ = model(text[None, 1:], states, None, places, None)
    return drafted[0].tolist(), logits[0]


@torch.no_grad()
def differences(text: Tensor) -> list[float]:
    """How far the logits of each drafted token are from those of transformers."""
    drafted, logits = theirs(text)
    head, read = OWN.bind(target(FAMILY)), {}
    ours = [without_cache(FAMILY, head, text.tolist(), drafted[:depth], read)[0] for depth in range(COUNT)]
    return [float((one - other).abs().max()) for one, other in zip(ours, logits, strict=True)]


@pytest.mark.parametrize("length", [4, 12])
def test_it_drafts_as_transformers_does(length):
    """Positions restart at 0 in csdraft, which changes nothing: only their differences count."""
    assert max(differences(texts(FAMILY)[0, :length])) < 1e-4


def test_a_module_that_sees_entries_before_its_first_is_found(monkeypatch):
    near = mtp.near
    monkeypatch.setattr(mtp, "near", lambda *given: near(*given[:4]))
    first, *later = differences(texts(FAMILY)[0, :6])
    assert first < 1e-4
    assert min(later) > 1e-3


def test_every_module_has_its_own_tensors():
    head, state = OWN.bind(target(FAMILY)), tensors_of(folder(FAMILY))
    assert type(head) is Modules
    assert head.deepest == COUNT
    assert head.config.num_hidden_layers == COUNT
    for number, module in enumerate(head.mtp):
        assert torch.equal(module.eh_proj.weight, state[module_name(FAMILY, "eh_proj.weight", number)])
        assert torch.equal(module.post_norm.weight, state[module_name(FAMILY, "shared_head.norm.weight", number)])


@pytest.mark.slow
@FORMS
def test_drafts_are_those_of_a_forward_without_a_cache(looked, rows, tree):
    """Features dropped at random between rounds change nothing but speed; no draft is longer than the modules."""
    kept, dropped = (looked(learned(), tree=tree, forget=forget) for forget in (False, True))
    plain = greedy(FAMILY, rows, LONG)
    assert torch.equal(written(FAMILY, kept, rows, **LONG), plain)
    assert torch.equal(written(FAMILY, dropped, rows, **LONG), plain)
    assert kept.drafts == dropped.drafts
    assert len(kept.errors) > 10 * rows
    assert max(kept.errors + dropped.errors) < 1e-4
    depths = [len(_path(parents, node)) for _, _, parents in kept.drafts for node in range(len(parents))]
    assert max(depths) == COUNT


def _path(parents: Any, node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


@pytest.mark.parametrize("mutant", ["parent", "target", "resumed"])
def test_a_feature_of_the_wrong_position_is_found(monkeypatch, looked, mutant):
    """Of another token, or of none where the head's own output at the entry before is there."""
    owner, name, wrong = {
        "parent": (spied.feature_session, "_parents", wrong_parent),
        "target": (spied.feature_session.FeatureSession, "_of_target", wrong_target),
        "resumed": (Modules, "resumed", lambda self, features, before: features),
    }[mutant]
    monkeypatch.setattr(owner, name, wrong)
    drafter = looked(learned(), tree=BestFirst(3, 9))
    written(FAMILY, drafter, **GREEDY)
    assert max(drafter.errors) > 1e-3


@pytest.mark.parametrize("rows", [1, 3])
@EVERY
def test_the_text_is_the_targets(rows, every):
    """Greedily and with coupled noise: by its name, as a chain, a tree, and a level of a cascade."""
    head, seeds = learned(), {**SAMPLED, "row_seeds": SAMPLED["row_seeds"][:rows]}
    plain, drawn = greedy(FAMILY, rows), written(FAMILY, MaxGram(), rows, **seeds)
    drafters = (
        "mtp",
        ModelDrafter(head),
        ModelDrafter(head, tree=BestFirst(3, 12)),
        CascadeDrafter([head, MaxGram()]),
    )
    for drafter, draws in each_way(drafters, rows, every):
        found = written(FAMILY, drafter, rows, **(seeds if draws else GREEDY))
        assert torch.equal(found, drawn if draws else plain)


@DRAWS
@pytest.mark.parametrize("tree", [None, Sampled()], ids=["chain", "tree"])
def test_independent_draws_have_the_targets_distribution(monkeypatch, tree, count):
    monkeypatch.setattr(spied, "target", lambda: target(FAMILY))
    drafter, rule = ModelDrafter(learned(), tree=tree), "rejection" if tree is None else "k_seq"
    spied.drawn_as_the_target(drafter, rule, count)


def test_what_it_drafts_becomes_text():
    options = GREEDY | {"eos_token_id": None, "return_dict_in_generate": True}
    out = written(FAMILY, ModelDrafter(learned()), **options)
    assert out.report.block_efficiency > 1.3


@pytest.mark.parametrize("number", range(COUNT))
def test_a_module_that_lacks_a_tensor_is_refused(tmp_path, number):
    state = {}
    for file in folder(FAMILY).glob("*.safetensors"):
        state |= load_file(file)
    own = {
        key: value for key, value in state.items() if int((key.split("layers.")[1:] or ["0."])[0].split(".")[0]) > 1
    }
    rest = {key: value for key, value in state.items() if key not in own}
    del own[module_name(FAMILY, "eh_proj.weight", number)]
    write(tmp_path, rest, own)
    (tmp_path / "config.json").write_text((folder(FAMILY) / "config.json").read_text())
    made = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"lacks layers\.{number}\.eh_proj\.weight"):
        OWN.bind(made)
