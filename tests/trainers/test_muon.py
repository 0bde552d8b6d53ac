"""Which weights Muon trains: matrices between hidden states, and no output layer, whatever its size."""

import pytest

from csdraft.trainers.muon import MuonAdamW
from tests.heads.kinds import new
from tests.tiny import fresh


def muons(model) -> set[str]:
    trained = {
        id(weight)
        for group in MuonAdamW(model, 0.01, 0.0, (0.9, 0.95)).parts[0].param_groups
        for weight in group["params"]
    }
    return {name for name, weight in model.named_parameters() if id(weight) in trained}


def test_a_models_output_layer_and_embedding_are_adamws():
    found = muons(fresh("llama"))
    assert found
    assert not [name for name in found if "embed" in name or "lm_head" in name or "norm" in name]


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_a_draft_vocabulary_as_large_as_a_matrix_changes_nothing(size):
    """Told apart by where they stand: a layer's matrices may have as many rows as the output layer."""
    usual = muons(new("eagle3", draft_vocab=60))
    count = getattr(new("eagle3").config, size)
    assert muons(new("eagle3", draft_vocab=min(count, 97))) == usual
    assert "lm_head.weight" not in usual
    assert [name for name in usual if "q_proj" in name]
    assert [name for name in usual if "gate_proj" in name]


def test_each_of_medusas_output_layers_is_adamws():
    found = muons(new("medusa"))
    assert found
    assert all("linear" in name for name in found)


@pytest.mark.drafts_nothing
def test_an_adapter_has_matrices_alone():
    """torch's AdamW takes no empty list of weights."""
    model = fresh("llama").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert muons(model) == {"model.layers.0.mlp.up_proj.weight"}
    state = (optimizer := MuonAdamW(model, 0.01, 0.0, (0.9, 0.95))).state_dict()
    optimizer.load_state_dict(state)
    assert len(optimizer.param_groups) == 1


@pytest.mark.drafts_nothing
def test_epsilon_is_adams():
    parts = MuonAdamW(fresh("llama"), 0.01, 0.0, (0.9, 0.95), 1e-3).parts
    assert parts[1].defaults["eps"] == 1e-3
