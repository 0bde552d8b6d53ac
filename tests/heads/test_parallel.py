"""What only parallel heads do: one forward a draft, placeholders, folders of speculators."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdraft.heads.kinds.parallel import Parallel
from csdraft.heads.stored_head import head_at
from csdraft.models import load_model
from csdraft.trainers.students import check_student, save_student
from csdraft.trees.best_first import BestFirst
from tests.heads import spied as spied_module
from tests.heads.kinds import learned, new
from tests.heads.learned import naive, target, texts
from tests.heads.spied import GREEDY, LONG, Spied, written


@pytest.mark.parametrize("tree", [None, BestFirst(3, 9)], ids=["chain", "tree"])
def test_layers_run_once_a_draft(monkeypatch, tree):
    """For the text's new entries; drafted tokens cost an output layer."""
    head, calls = learned("parallel"), []
    hook = head.midlayer.register_forward_hook(lambda *_: calls.append(1))
    spied = Spied(head, tree=tree)
    monkeypatch.setattr(spied_module, "naive", lambda *_: (torch.zeros(97), None))  # which runs the layers, too
    written(spied, rows=1, **GREEDY)
    hook.remove()
    drafts = [tokens for _, tokens, _ in spied.drafts if tokens]
    assert max(map(len, drafts)) > 2
    assert len(calls) == 2 * len(drafts)  # the text, then its placeholders


@pytest.mark.parametrize("tree", [None, BestFirst(3, 9)], ids=["chain", "tree"])
def test_more_layers_draft_as_a_naive_forward(tree):
    spied = Spied(learned("parallel", 25, blocks=2), tree=tree, forget=True)
    written(spied, **LONG)
    assert len(spied.errors) > 30
    assert max(spied.errors) < 1e-4


def test_unrolled_placeholders_of_more_layers_are_what_drafting_computes():
    head, ids = learned("parallel", 25, blocks=2), texts()[:1, :12]
    with torch.no_grad():
        states = dict(enumerate(target()(ids, output_hidden_states=True).hidden_states))
        steps = list(head.unrolled(ids, torch.arange(12)[None], head.fuse(states), 3))
        for entry in range(8):
            for step, output in enumerate(steps):
                wanted, _ = naive(head, ids[0, : entry + 2].tolist(), ids[0, entry + 2 : entry + 2 + step].tolist())
                own = head.spread(head.draft_logits(output[:, entry]))[0]
                assert torch.allclose(own, wanted, atol=1e-4)


def test_a_later_token_does_not_depend_on_an_earlier_one():
    text = texts()[0, :9].tolist()
    (one, _), (other, _) = (naive(learned("parallel"), text, path) for path in ([3, 5], [8, 13]))
    first, _ = naive(learned("parallel"), text, [])
    assert torch.equal(one, other)
    assert not torch.allclose(one, first, atol=1e-2)


def stored(folder: Any, **options: Any) -> tuple[Parallel, dict[str, Any], dict[str, Any]]:
    head = new("parallel", **options)
    save_student(head, folder)
    return head, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def test_it_is_stored_as_a_folder_of_speculators(tmp_path):
    head, config, state = stored(tmp_path, blocks=2)
    assert config["speculators_model_type"] == "peagle"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["transformer_layer_config"]["num_hidden_layers"] == 2
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    assert config["norm_before_residual"] is False  # whose default is another in vLLM
    assert state["mask_hidden"].shape == (1, 1, 96)
    assert state["layers.0.self_attn.q_proj.weight"].shape[1] == 64
    assert state["layers.1.self_attn.q_proj.weight"].shape[1] == 32
    assert not any(name.startswith("midlayer") for name in state)
    found = head_at(str(tmp_path))
    assert found is not None
    assert found.described()["kind"].startswith("parallel head of 3 tokens")
    assert head.options == found.options  # type: ignore[attr-defined]


def test_an_embedding_of_its_own_is_used(tmp_path):
    """P-EAGLE trains one, with the mask token's."""
    head, _, state = stored(tmp_path)
    own = target().get_input_embeddings().weight.detach().flip(0)
    save_file(state | {"embed_tokens.weight": own.contiguous()}, tmp_path / "model.safetensors")
    found: Any = load_model(str(tmp_path)).bind(target())
    assert torch.equal(found.embed_tokens.weight, own)
    text = texts()[0, :9].tolist()
    assert not torch.allclose(naive(found, text, [])[0], naive(head, text, [])[0], atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 97}, "mask_token_id=97"),
        ({"speculators_config": {}}, "speculative_tokens"),
        ({"speculators_config": {"proposal_methods": {"speculative_tokens": 3}}}, "proposal_methods"),
        ({"speculators_config": {"proposal_methods": [3]}}, "proposal_methods"),
    ],
)
def test_a_config_that_leaves_out_what_it_needs_is_refused(tmp_path, keys, says):
    _, config, _ = stored(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ValueError, match=says):
        load_model(str(tmp_path))


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"mask_token": 97}])
def test_options_of_no_parallel_head_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        check_student(target().config, init={"parallel": {"layers": [0, 1, 3]} | wrong})
