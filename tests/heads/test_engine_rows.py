"""What vLLM 0.33 and SGLang 0.5.23 do with EAGLE folders, and what published folders look like, row by row.

Rows that a change of one key shows stand in `test_export.py`; here are those of names, tensors and loading.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdraft import ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.heads.engines import ServedTarget
from csdraft.heads.formats.eagle3 import Eagle3Head
from csdraft.models import load_model
from csdraft.trainers.students import save_student
from tests.heads.kinds import new
from tests.heads.learned import new_head, target, texts
from tests.tiny import tokenizer

SIZES = ServedTarget("target", ("LlamaForCausalLM",), 97, 32, 3, 256, lambda: target().get_input_embeddings().weight)
IDS = "eagle_aux_hidden_state_layer_ids"
HERE = {"vllm": "", "sglang": ""}
"""No fault in either engine."""


def write(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Another config.json and other tensors; the value None stands in the file as null."""
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))
    if state is not None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def found(folder: Path, engine: str, sizes: ServedTarget | None = SIZES) -> str:
    """What `csdraft inspect` says of an engine; "" if it loads the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head: Any = load_model(str(folder))
    document = json.loads((folder / "config.json").read_text())
    return "\n".join(head.faults(engine, document, head.weights(str(folder)), sizes))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    head: Any = as_drafter(ModelDrafter(folder), target()).network
    ids = texts()[:1, :12]
    states = target()(ids, output_hidden_states=True).hidden_states
    return head.along(dict(enumerate(states)) | {-1: states[-1]}, ids, torch.arange(12)[None], torch.ones_like(ids))


# EAGLE-1.


@pytest.fixture(scope="module")
def eagle(tmp_path_factory) -> Path:
    """A head as each engine wants it, in the folders vllm and sglang, and the target."""
    folder = tmp_path_factory.mktemp("eagle")
    target().save_pretrained(folder / "target")
    tokenizer().save_pretrained(folder / "target")
    save_student(new("eagle", draft_vocab=None), folder / "head")
    for engine in HERE:
        asked = ["export", str(folder / "head"), str(folder / engine), "--to", engine]
        assert main([*asked, "--target", str(folder / "target")]) == 0
    return folder


ONES = torch.ones(32)
EAGLE: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
    "as exported": ({}, HERE),
    "an output layer": ({"lm_head.weight": torch.ones(97, 32)}, {"vllm": "lm_head.weight is not a", "sglang": ""}),
    "t2d": ({"t2d": torch.ones(97)}, {"vllm": "t2d is not a tensor", "sglang": ""}),
    "frequencies": ({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, HERE),
    "an embedding": (
        {"embed_tokens.weight": torch.ones(97, 32)},
        {"vllm": "", "sglang": "embed_tokens.weight: it takes the target's"},
    ),
}
"""Tensors beside those of a head -> what each engine makes of them."""


@pytest.mark.filterwarnings("ignore:.*is not read")
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("row", EAGLE)
def test_tensors_beside_an_eagle_head(eagle, tmp_path, row, engine):
    folder = Path(shutil.copytree(eagle / engine, tmp_path / "head"))
    more, wanted = EAGLE[row]
    write(folder, load_file(folder / "model.safetensors") | more)
    assert found(folder, engine).startswith(wanted[engine])
    assert bool(found(folder, engine)) == bool(wanted[engine])


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("name", ["layers.0.input_layernorm.weight", "norm.weight", "layers.1.mlp.up_proj.weight"])
def test_an_eagle_head_has_no_such_norms_and_one_layer(eagle, engine, name):
    folder = eagle / engine
    head: Any = load_model(str(folder))
    document = json.loads((folder / "config.json").read_text())
    assert f"{name} is not a tensor" in "".join(head.faults(engine, document, {**head.state, name: ONES}))


@pytest.mark.parametrize("engine", HERE)
def test_engines_prefix_the_names_of_an_eagle_head_themselves(eagle, tmp_path, engine):
    """csdraft reads such a folder, and an export is right again."""
    folder = Path(shutil.copytree(eagle / engine, tmp_path / "head"))
    write(folder, {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()})
    assert "fc.weight is missing" in found(folder, engine)
    assert torch.equal(logits(folder), logits(eagle / engine))
    asked = ["export", str(folder), str(tmp_path / "out"), "--to", engine, "--target", str(eagle / "target")]
    assert main(asked) == 0
    assert found(tmp_path / "out", engine) == ""


def test_the_targets_own_embedding_is_left_out_of_an_eagle_head(eagle, tmp_path):
    """Published folders hold it."""
    folder = Path(shutil.copytree(eagle / "head", tmp_path / "head"))
    table = target().get_input_embeddings().weight.detach()
    write(folder, load_file(folder / "model.safetensors") | {"embed_tokens.weight": table})
    for engine in HERE:
        asked = ["export", str(folder), str(tmp_path / engine), "--to", engine, "--target", str(eagle / "target")]
        assert main(asked) == 0
        assert "embed_tokens.weight" not in load_file(tmp_path / engine / "model.safetensors")


@pytest.mark.parametrize(
    ("engine", "sizes", "says"),
    [
        ("vllm", {"vocab_size": 128}, "vocab_size=97, the target target has 128"),
        ("vllm", {"hidden_size": 64}, "has 64"),
        ("sglang", {"vocab_size": 128}, "vocab_size=97, the target target has 128"),
        ("sglang", {"positions": 512}, "max_position_embeddings=256 is less than the target's 512"),
    ],
)
def test_an_eagle_head_of_another_target(eagle, engine, sizes, says):
    assert says in found(eagle / engine, engine, replace(SIZES, **sizes))


# EAGLE-3.


@pytest.fixture
def stored(tmp_path) -> Path:
    Eagle3Head.of(new_head(layers=(0, 1, 2))).save(tmp_path / "head")
    return tmp_path / "head"


def test_an_old_folder_with_norms_is_read(tmp_path):
    """SGLang reads the old names still, vLLM does not."""
    Eagle3Head.of(new_head(layers=(0, 1, 2), fc_norm=True)).save(tmp_path)
    wanted, state = logits(tmp_path), load_file(tmp_path / "model.safetensors")
    for number, old in enumerate(("low", "mid", "high")):
        state[f"aux_norm_{old}.weight"] = state.pop(f"fc_norm.{number}.weight")
    write(tmp_path, state, fc_norm=None, use_aux_norm=True)
    assert torch.equal(logits(tmp_path), wanted)
    assert found(tmp_path, "sglang") == ""
    assert "aux_norm_high.weight" in found(tmp_path, "vllm")
    write(tmp_path, use_aux_norm=False)
    with pytest.raises(ValueError, match=r"not know .*fc_norm\.0\.weight"):
        load_model(str(tmp_path))
    write(tmp_path, use_aux_norm="yes")
    with pytest.raises(ValueError, match="use_aux_norm"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda state: state.pop("t2d"), HERE),
        (lambda state: state.update({"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}), HERE),
        (
            lambda state: state.update({"model.lm_head.weight": state.pop("lm_head.weight")}),
            {engine: "lm_head.weight is missing" for engine in HERE},
        ),
    ],
    ids=["no t2d", "frequencies", "an output layer inside of the model"],
)
def test_tensors_of_an_eagle_3_head(stored, change, wanted):
    state = load_file(stored / "model.safetensors")
    change(state)
    write(stored, state)
    for engine, says in wanted.items():
        assert found(stored, engine).startswith(says)
        assert bool(found(stored, engine)) == bool(says)
    logits(stored)


@pytest.mark.parametrize("engine", HERE)
def test_an_eagle_3_head_has_one_layer(stored, engine):
    head: Any = load_model(str(stored))
    document, name = json.loads((stored / "config.json").read_text()), "layers.1.mlp.up_proj.weight"
    assert f"{name} is not a tensor" in "".join(head.faults(engine, document, {**head.state, name: ONES}))


@pytest.mark.parametrize(
    "changes",
    [{"num_aux_hidden_states": None}, {"target_hidden_size": None}, {"torch_dtype": None}, {"fc_norm": None}],
)
def test_keys_that_engines_have_defaults_for(stored, changes):
    wanted = logits(stored)
    write(stored, **changes)
    assert torch.equal(logits(stored), wanted)
    assert found(stored, "vllm") == found(stored, "sglang") == ""


def test_two_hidden_states_need_their_number_in_vllm(tmp_path):
    """Without it vLLM and SGLang count those of eagle_config, and take 3 if that names none."""
    Eagle3Head.of(new_head(layers=(0, 2))).save(tmp_path)
    write(tmp_path, num_aux_hidden_states=None)
    assert found(tmp_path, "vllm") == found(tmp_path, "sglang") == ""
    write(tmp_path, eagle_config=None)
    assert "num_aux_hidden_states=None must be 2" in found(tmp_path, "vllm")


def test_ids_that_are_null_are_the_papers(tmp_path):
    Eagle3Head.of(new_head(layers=(0, 1, 2))).save(tmp_path)
    write(tmp_path, **{IDS: None, "eagle_config": {IDS: None}})
    with pytest.warns(UserWarning, match="after blocks 2, L/2 and L - 3 of the target"):
        head: Any = load_model(str(tmp_path))
    with pytest.raises(ValueError, match="L=3 layers; name others"):
        head.bind(target())


def test_an_attention_with_biases_is_for_vllm(tmp_path):
    made = new_head(layers=(0, 1, 2))
    Eagle3Head.of(made).save(tmp_path)
    plain, state = logits(tmp_path), load_file(tmp_path / "model.safetensors")
    for name in "qkvo":
        rows = state[f"midlayer.self_attn.{name}_proj.weight"].shape[0]
        state[f"midlayer.self_attn.{name}_proj.bias"] = torch.full((rows,), 0.3)
    write(tmp_path, state, attention_bias=True)
    assert not torch.allclose(logits(tmp_path), plain, atol=1e-3)
    assert found(tmp_path, "vllm") == ""
    assert "attention_bias is true" in found(tmp_path, "sglang")


def test_a_scale_of_logits_is_refused(stored):
    write(stored, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"logit_scale=0\.5"):
        load_model(str(stored))


@pytest.mark.parametrize("value", [None, "A", {"hidden_size": 64}])
def test_a_key_of_another_layout_in_an_eagle_folder_says_nothing(eagle, tmp_path, value):
    for engine in HERE:
        folder = Path(shutil.copytree(eagle / engine, tmp_path / engine))
        assert found(write(folder, transformer_layer_config=value), engine) == ""


def test_no_hidden_states_of_an_eagle_3_head_are_fused_if_the_key_is_null(tmp_path):
    """An engine takes a null for false, and a missing key for true."""
    for eagle, says in (({"use_aux_hidden_state": None}, "use_aux_hidden_state=None must be True"), ({}, "")):
        save_student(new_head(layers=(0, 1, 2)), tmp_path / "head")
        document = json.loads((tmp_path / "head" / "config.json").read_text())
        write(tmp_path / "head", eagle_config={IDS: document["eagle_config"][IDS]} | eagle)
        for engine in HERE:
            assert says in found(tmp_path / "head", engine)
            assert bool(says) == bool(found(tmp_path / "head", engine))
