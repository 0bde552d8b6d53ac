"""EAGLE-1 heads in folders: what is written, what published folders may look like, and what is no head."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from csdraft import ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.heads import stored_head
from csdraft.heads.engines import ENGINES
from csdraft.heads.formats.eagle import EagleHead
from csdraft.heads.formats.eagle3 import Eagle3Head
from csdraft.models import load_model
from csdraft.trainers.students import make_student, save_student
from tests.heads.kinds import new
from tests.heads.learned import naive, new_head, target, texts
from tests.heads.test_training import damaged, edit, pickled
from tests.tiny import fresh

ATTENTION = {f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
MLP = {f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
PUBLISHED = ATTENTION | MLP | {"fc.weight", "layers.0.post_attention_layernorm.weight"}
"""Names of the tensors of the original code, beside the embedding and a bias of fc."""


def made(name: str = "eagle", **options: Any) -> Any:
    return new(name, **{"draft_vocab": None, "config": {"intermediate_size": 40}} | options)


@pytest.fixture
def stored(tmp_path) -> Path:
    save_student(made(), tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def published(tmp_path) -> Path:
    """As the original code's folders: a pickle with the embedding in it, and a config with little of its own."""
    head, folder = made(bias=True), tmp_path / "published"
    folder.mkdir()
    torch.nn.init.normal_(head.fc.bias)
    state = {name: t for name, t in head.state_dict().items() if name not in ("lm_head.weight", "d2t")}
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 256,
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 97, "rope_theta": 10000.0, "bias": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of(head: Any) -> torch.Tensor:
    states = {-1: target()(texts()[:1, :12], output_hidden_states=True).hidden_states[-1]}
    return head.along(states, texts()[:1, :12], torch.arange(12)[None], torch.ones(1, 12, dtype=torch.long))


def loaded(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return of(as_drafter(ModelDrafter(folder), target()).network)


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_written_is_the_original_layout(tmp_path, bias):
    save_student(made(bias=bias), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == PUBLISHED | ({"fc.bias"} if bias else set())
    assert load_file(tmp_path / "model.safetensors")["fc.weight"].shape == (32, 64)
    document = json.loads((tmp_path / "config.json").read_text())
    wanted = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 97, "bias": bias}
    wanted |= {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32"}
    assert {key: document[key] for key in wanted} == wanted
    assert document["architectures"] == ["LlamaForCausalLMEagle" if bias else "LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["eagle", "hass"])
def test_how_it_was_trained_is_kept(tmp_path, name):
    head = made(name, steps=2, noise=0.2, regression=0.5)
    save_student(head, tmp_path)
    again = make_student(target(), str(tmp_path))
    assert type(again) is type(head)
    kept = {key: value for key, value in vars(head.options).items() if key != "config"}
    assert {key: value for key, value in vars(again.options).items() if key != "config"} == kept
    with torch.no_grad():
        assert torch.equal(of(again.eval()), of(head))


@torch.no_grad()
def test_published_folders(published):
    """Each of what they differ in leaves the head what it is: names, files, configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = loaded(published)
    state = torch.load(published / "pytorch_model.bin")
    for changes in (
        {"num_hidden_layers": 32, "bias": None},
        {"architectures": None, "rope_theta": None},
        {"architectures": ["LlamaForCausalLMEagle"], "quantization_config": [], "bias": False},
        {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 3, "num_key_value_heads": 2},
    ):
        edit(published, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(loaded(published), wanted)
    (published / "pytorch_model.bin").unlink()
    frequencies = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for kept in (state, {f"model.{name}": tensor for name, tensor in state.items()}, state | frequencies):
        save_file(kept, published / "model.safetensors")
        edit(published, architectures=["LlamaForCausalLM"], bias=True, num_hidden_layers=1)
        assert torch.equal(loaded(published), wanted)


@torch.no_grad()
def test_an_embedding_of_its_own_is_used(published):
    wanted, state = loaded(published), torch.load(published / "pytorch_model.bin")
    torch.save(state | {"embed_tokens.weight": state["embed_tokens.weight"] + 0.1}, published / "pytorch_model.bin")
    assert not torch.allclose(loaded(published), wanted, atol=1e-3)
    head: Any = load_model(str(published))
    assert head.described()["embedding"] == "its own"
    bound = head.bind(target())
    assert bound.lm_head.weight.data_ptr() == target().lm_head.weight.data_ptr()


@torch.no_grad()
def test_what_a_folder_leaves_open_is_said(published):
    wanted, state = loaded(published), torch.load(published / "pytorch_model.bin")
    edit(published, num_hidden_layers=32, bias=False)
    torch.save(state | {"lm_head.weight": torch.ones(97, 32)}, published / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"lm_head\.weight is not read.*bias is false, and there is a.*=32 is the"):
        assert torch.equal(loaded(published), wanted)
    del state["fc.bias"]
    torch.save(state, published / "pytorch_model.bin")
    edit(published, num_hidden_layers=1, bias=None)
    with pytest.warns(UserWarning, match=r"bias is not set and there is no fc\.bias: false is assumed") as said:
        load_model(str(published))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damaged("fc.bias", lambda _: torch.zeros(3)), r"fc\.bias has shape \(3,\)"),
        (damaged("fc.weight", lambda old: old.T.contiguous()), r"fc\.weight has shape \(64, 32\)"),
        (damaged("fc.weight", lambda _: None), r"lacks fc\.weight"),
        (damaged("layers.0.mlp.up_proj.weight", lambda _: None), r"lacks layers\.0\.mlp\.up_proj\.weight"),
        (damaged("layers.0.input_layernorm.weight", lambda _: torch.ones(32)), r"not know .*input_layernorm"),
        (damaged("layers.1.mlp.up_proj.weight", lambda _: torch.ones(32)), r"not know .*layers\.1\.mlp"),
        (damaged("norm.weight", lambda _: torch.ones(32)), r"not know .*norm\.weight"),
        (damaged("d2t", lambda _: torch.zeros(60, dtype=torch.long)), r"lacks lm_head\.weight"),
        (lambda folder: edit(folder, bias=True), r"lacks fc\.bias"),
        (lambda folder: edit(folder, bias="no"), "bias"),
        (lambda folder: edit(folder, vocab_size=None), "vocab_size"),
        (lambda folder: edit(folder, hidden_size=16), "has shape"),
        (lambda folder: edit(folder, model_type="qwen2"), "qwen2"),
        (lambda folder: edit(folder, num_attention_heads="many"), "not a config of a Llama layer"),
        (lambda folder: edit(folder, quantization_config={"bits": 4}), "not quantised"),
        (lambda folder: edit(folder, csdraft_init={"medusa": {}}), "csdraft_init.*not a head with EAGLE-1's module"),
        (lambda folder: edit(folder, csdraft_init={"eagle": {}, "hass": {}}), "csdraft_init"),
        (lambda folder: edit(folder, csdraft_init=["eagle"]), "csdraft_init"),
        (lambda folder: edit(folder, csdraft_init={"eagle": 1}), r"csdraft_init\.eagle"),
        (lambda folder: edit(folder, csdraft_init={"eagle": {"step": 1}}), "step"),
        (pickled([1]), "other things than tensors by name"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cut short"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(b"hello"),
            "pytorch_model.bin (cannot be read|holds other)",  # torch raises a KeyError
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), r"none of model\.safetensors"),
    ],
)
def test_a_tampered_folder_is_refused(stored, damage, says):
    damage(stored)
    with pytest.raises(ValueError, match=says):
        load_model(str(stored))


def test_another_target_is_refused(stored, published):
    with pytest.raises(ValueError, match="was trained on"):
        as_drafter(ModelDrafter(stored), fresh("llama", seed=3, num_hidden_layers=3))
    with pytest.raises(ValueError, match="hidden_size=32"):
        as_drafter(ModelDrafter(published), fresh("llama", hidden_size=64))


# What is no such head.


def test_ordinary_models_are_left_alone(tmp_path, monkeypatch):
    """A whole Llama, in one file, in parts, or pickled; no tensor of one that cannot be a head is looked at."""
    model = fresh("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    fresh("qwen3").save_pretrained(tmp_path / "other")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    inner, seen = stored_head.tensor_names, []
    monkeypatch.setattr(stored_head, "tensor_names", lambda path, **hub: seen.append(path) or inner(path, **hub))
    for name in ("one", "parts", "pickled"):
        found: Any = load_model(str(tmp_path / name))
        assert isinstance(found, LlamaForCausalLM)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert [Path(path).name for path in seen] == ["one", "parts", "pickled"]  # once each
    load_model(str(tmp_path / "other"))
    assert len(seen) == 3
    assert inner(str(tmp_path / "parts")) == inner(str(tmp_path / "one"))


@pytest.mark.parametrize("content", [b"cut", None])
def test_a_model_whose_weights_cannot_be_read_is_refused_as_before(tmp_path, content):
    fresh("llama").save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"cut short|no file named"):
        load_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*is not set")
def test_eagle_3_folders_are_left_to_it(tmp_path):
    Eagle3Head.of(new_head()).save(tmp_path)
    assert type(load_model(str(tmp_path))) is Eagle3Head
    edit(tmp_path, architectures=["LlamaForCausalLM"])
    assert type(load_model(str(tmp_path))) is Eagle3Head
    edit(tmp_path, draft_vocab_size=None)
    names = load_file(tmp_path / "model.safetensors")
    assert not EagleHead.recognises(json.loads((tmp_path / "config.json").read_text()), names.keys)


def test_heads_of_csdrafts_own_layout_are_left_to_it(tmp_path):
    save_student(made("fspad"), tmp_path)
    head: Any = load_model(str(tmp_path))
    assert type(head).__name__ == "OwnHead"
    assert head.name == "fspad"
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    assert not EagleHead.recognises(config, head.state.keys)


# Engines.


def refusals(folder: Path) -> dict[str, str | None]:
    head: Any = load_model(str(folder))
    document = json.loads((folder / "config.json").read_text())
    tensors = head.weights(str(folder))
    return {name: "; ".join(head.faults(engine, document, tensors)) or None for engine, name in ENGINES.items()}


@pytest.mark.parametrize("name", ["eagle", "hass"])
def test_which_engine_loads_what_is_written(tmp_path, name, capsys):
    save_student(made(name), tmp_path / "plain")
    save_student(made(name, bias=True), tmp_path / "bias")
    save_student(made(name, draft_vocab=60), tmp_path / "part")
    plain, bias, part = (refusals(tmp_path / folder) for folder in ("plain", "bias", "part"))
    assert plain["vLLM"] is None
    assert "fc.bias is missing" in plain["SGLang"]
    assert "'LlamaForCausalLMEagle'" in plain["SGLang"]
    assert bias["SGLang"] is None
    assert "takes no fc.bias" in bias["vLLM"]
    assert "'LlamaForCausalLM'" in bias["vLLM"]
    assert all("d2t" in part[engine] for engine in ("vLLM", "SGLang"))
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    said = capsys.readouterr().out
    assert f"{name} head" in said
    assert "vLLM              loads it" in said
    assert "fc.bias is missing" in said


@pytest.mark.filterwarnings("ignore:.*is the target's")
def test_which_engine_loads_a_published_folder(published):
    assert "must be 'LlamaForCausalLMEagle'" in refusals(published)["SGLang"]
    edit(published, architectures=["LlamaForCausalLMEagle"])
    assert str(refusals(published)["SGLang"]).startswith("embed_tokens.weight: it takes the target's")
    edit(published, num_hidden_layers=32)
    assert all("num_hidden_layers=32" in refusals(published)[engine] for engine in ("vLLM", "SGLang"))


def test_a_bias_of_zeros_is_left_out_for_vllm(tmp_path):
    head = made("eagle", bias=True)
    assert not head.fc.bias.any()
    save_student(head, tmp_path / "head")
    target().save_pretrained(tmp_path / "target")
    asked = ["export", str(tmp_path / "head"), str(tmp_path / "out"), "--to", "vllm"]
    assert main([*asked, "--target", str(tmp_path / "target")]) == 0
    assert "fc.bias" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_exported_head_is_what_its_engine_loads_and_the_same_head(tmp_path, engine, bias):
    """SGLang gets zeros for a bias that there is none of; vLLM takes none that is not 0."""
    head = made("eagle", bias=bias)
    if bias:
        torch.nn.init.constant_(head.fc.bias, 0.1)
    save_student(head, tmp_path / "head")
    target().save_pretrained(tmp_path / "target")
    command = [
        "export",
        str(tmp_path / "head"),
        str(tmp_path / "out"),
        "--to",
        engine,
        "--target",
        str(tmp_path / "target"),
    ]
    if engine == "vllm" and bias:
        assert main(command) == 2
        return
    assert main(command) == 0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert ("fc.bias" in state) == (engine == "sglang")
    text = texts()[0, :12].tolist()
    found: Any = as_drafter(ModelDrafter(tmp_path / "out"), target()).network
    assert torch.equal(naive(found, text, [])[0], naive(head, text, [])[0])
    save_file(
        {name: t for name, t in state.items() if "down_proj" not in name}, tmp_path / "out" / "model.safetensors"
    )
    loaded: Any = load_model(str(tmp_path / "head"))
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    faults = loaded.faults(engine, document, load_file(tmp_path / "out" / "model.safetensors"))
    assert faults == ["layers.0.mlp.down_proj.weight is missing"]
    wide = {**state, "fc.weight": torch.zeros(32, 65)}
    assert "fc.weight has shape (32, 65)" in loaded.faults(engine, document, wide)[0]
