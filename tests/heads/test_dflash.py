"""What only DFlash heads do: the published computation, and published folders."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.muse_glimmer_assistant.configuration_muse_glimmer_assistant import MuseGlimmerAssistantConfig
from transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant import MuseGlimmerAssistantModel

from csdraft.export import export_drafter, served_target
from csdraft.heads.stored_head import head_at
from csdraft.models import load_model
from csdraft.trainers.students import check_student, save_student
from tests.heads.kinds import learned, new
from tests.heads.learned import naive, target, texts


def theirs(head: Any) -> Any:
    """The head's weights in transformers' own model of DFlash."""
    config, blocks = head.config, head.options.blocks
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    )
    made = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(
            **{key: getattr(config, key) for key in keys},
            num_hidden_layers=blocks,
            layer_types=["full_attention"] * blocks,
            rope_parameters=dict(config.rope_parameters),
            target_layer_ids=[layer - 1 for layer in head.options.layers],
            attn_implementation="eager",
        )
    )
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    state = {renamed.get(name, name): tensor for name, tensor in head.state_dict().items()}
    for name in ("embed_tokens.weight", "lm_head.weight", "d2t"):
        del state[name]
    made.load_state_dict(state)
    return made.eval()


@pytest.mark.parametrize("name", ["new", "learned"])
def test_it_computes_what_transformers_does(name):
    """The block behind a text: last token and placeholders, all of the target's features but that token's."""
    head: Any = new("dflash") if name == "new" else learned("dflash")
    text, reference = texts()[0, :11], theirs(head)
    block = torch.tensor([[int(text[-1]), *[head.options.mask_token] * head.options.steps]])
    with torch.no_grad():
        states = target()(text[None], output_hidden_states=True).hidden_states
        wanted = reference(
            noise_embeds=head.embed_tokens(block),
            context_hidden_states=torch.cat([states[layer][:, :10] for layer in head.options.layers], -1),
            position_ids=torch.arange(10 + block.shape[1])[None],
        ).last_hidden_state[:, 1:]
    path: list[int] = []
    for step in range(head.options.steps):
        logits, _ = naive(head, text.tolist(), path)
        assert torch.allclose(logits, head.spread(head.lm_head(wanted[0, step])), atol=1e-4)
        path.append(7)


def stored(folder: Any, **options: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    head = new("dflash", **options)
    save_student(head, folder)
    return head, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def test_it_is_stored_as_published(tmp_path):
    head, config, state = stored(tmp_path, draft_vocab=None)
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == 4
    assert config["num_hidden_layers"] == 2
    assert config["dflash_config"]["target_layer_ids"] == [0, 1, 2]  # the output of block k is hidden state k + 1
    assert "layers.1.self_attn.q_norm.weight" in state
    assert not state.keys() & {"embed_tokens.weight", "lm_head.weight", "d2t"}
    found: Any = head_at(str(tmp_path))
    assert found.described()["kind"].startswith("DFlash head of 3 tokens, 2 layers")
    assert found.options == head.options


def test_a_folder_with_the_least_that_is_published_is_read(tmp_path):
    """Keys that csdraft writes and others do not."""
    head, config, state = stored(tmp_path, draft_vocab=None)
    for key in ("draft_vocab_size", "target_hidden_size", "head_dim", "layer_types"):
        del config[key]
    config["dflash_config"] = {key: config["dflash_config"][key] for key in ("mask_token_id", "target_layer_ids")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    (tmp_path / "drafter.json").unlink()
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    found: Any = load_model(str(tmp_path)).bind(target())
    text = texts()[0, :9].tolist()
    assert torch.equal(naive(found, text, [5])[0], naive(head, text, [5])[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="shape"):  # a Qwen 3 config without head_dim means 128
        load_model(str(tmp_path))


def test_a_block_whose_first_token_predicts_is_read(tmp_path):
    _, config, _ = stored(tmp_path)
    config["dflash_config"]["sample_from_anchor"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    found: Any = load_model(str(tmp_path)).bind(target())
    assert found.deepest == 4
    text = texts()[0, :9].tolist()
    logits = [naive(found, text, [5] * step)[0] for step in range(4)]
    assert all(not torch.allclose(one, other) for one, other in pairwise(logits))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"dflash_config": {"target_layer_ids": [0, 1, 2]}}, "mask_token_id"),
        ({"dflash_config": {"target_layer_ids": [0, 1, 2], "mask_token_id": 97}}, "mask_token_id=97"),
        ({"dflash_config": {"target_layer_ids": [0, 1, 2], "mask_token_id": 0, "causal": True}}, "causal"),
        ({"dflash_config": {"target_layer_ids": [0, 1, 2], "mask_token_id": 0, "use_swa": True}}, "use_swa"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": -1}, "layer_types"),
        ({"block_size": 1}, "block_size=1"),
        ({"model_type": "gemma3"}, "gemma3"),
    ],
)
def test_what_csdraft_does_not_know_is_refused(tmp_path, keys, says):
    _, config, _ = stored(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ValueError, match=says):
        load_model(str(tmp_path))


def test_embeddings_are_no_layer_of_its_layout():
    with pytest.raises(ValueError, match="begin at 1"):
        check_student(target().config, init={"dflash": {"layers": [0, 1, 3]}})


def test_a_dflash_head_for_sglang_takes_texts_as_long_as_the_targets(tmp_path):
    """SGLang refuses a drafter of shorter ones; this kind of rotary embedding does not depend on that number."""
    save_student(new("dflash", draft_vocab=None, layers=[1, 2]), tmp_path / "head")
    document = json.loads((tmp_path / "head" / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "head" / "config.json").write_text(json.dumps(document))
    target().save_pretrained(tmp_path / "target")
    head: Any = load_model(str(tmp_path / "head"))
    said = head.faults("sglang", document, head.state, served_target(str(tmp_path / "target")))
    assert "max_position_embeddings=64 is less than the target's 256" in "".join(said)
    export_drafter(str(tmp_path / "head"), tmp_path / "out", "sglang", str(tmp_path / "target"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 256
