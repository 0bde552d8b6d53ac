"""csdraft export writes what a serving engine loads as the same drafter, and refuses what it would not."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.export import export_drafter, served_target, whole_faults
from csdraft.heads.engines import ServedTarget, context_fault, serve_command
from csdraft.heads.formats.eagle3 import Eagle3Head
from csdraft.models import load_model
from csdraft.trainers.publish import serving
from csdraft.trainers.students import make_student, save_student
from tests.heads.kinds import NAMES, new
from tests.heads.learned import new_head, target
from tests.tiny import fresh, noisy, on_target, prompt, tokenizer

LAYERS = (0, 1, 2)
ENGINES = ("vllm", "sglang", "speculators")
IDS = "eagle_aux_hidden_state_layer_ids"
SIZES = ServedTarget("target", ("LlamaForCausalLM",), 97, 32, 3, 256, lambda: target().get_input_embeddings().weight)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    """The target's folder."""
    folder = str(tmp_path_factory.mktemp("export") / "target")
    target().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def head_logits(folder: Path) -> torch.Tensor:
    """What a stored head says, on the target."""
    head: Any = as_drafter(ModelDrafter(folder), target()).network
    ids = prompt(12)["input_ids"]
    states = dict(enumerate(target()(ids, output_hidden_states=True).hidden_states))
    return head.along(states, ids, torch.arange(12)[None], torch.ones_like(ids))


@torch.no_grad()
def model_logits(model: Any) -> torch.Tensor:
    return model(prompt()["input_ids"]).logits


def stored(folder: Path, **flags: Any) -> Path:
    Eagle3Head.of(new_head(layers=LAYERS, **flags)).save(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# Heads.

VARIANTS = [
    *({"draft_vocab": rows} for rows in (60, 97)),
    *({flag: True} for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "-".join(f"{key}={flags[key]}" for key in flags))
def test_an_exported_head_has_the_same_logits(verifier, tmp_path, engine, flags):
    stored(tmp_path / "head", **flags)
    asked = (str(tmp_path / "head"), tmp_path / "out", engine, verifier)
    if engine == "sglang" and "norm_before_residual" in flags:
        with pytest.raises(ValueError, match=r"norm_before_residual is true, .*use --to vllm"):
            export_drafter(*asked)
        return
    export_drafter(*asked)
    assert torch.equal(head_logits(tmp_path / "out"), head_logits(tmp_path / "head"))
    found, document = load_file(tmp_path / "out" / "model.safetensors"), config_of(tmp_path / "out")
    assert ("d2t" in found) == (flags.get("draft_vocab") != 97)
    assert document["draft_vocab_size"] == flags.get("draft_vocab", 60)
    assert document["norm_before_residual"] is flags.get("norm_before_residual", False)
    assert document[IDS] == [0, 1, 2]
    if engine != "speculators":
        assert document["eagle_config"][IDS] == [-1, 0, 1]  # SGLang takes the states after blocks id + 1
        assert "embed_tokens.weight" not in found


@pytest.mark.parametrize("first", ENGINES)
@pytest.mark.parametrize("second", ENGINES)
def test_what_was_exported_for_one_engine_goes_to_another(verifier, tmp_path, first, second):
    """The embedding that speculators needs is the target's, and is left out for the others."""
    wanted = head_logits(stored(tmp_path / "head"))
    export_drafter(str(tmp_path / "head"), tmp_path / "first", first, verifier)
    export_drafter(str(tmp_path / "first"), tmp_path / "second", second, verifier)
    assert torch.equal(head_logits(tmp_path / "second"), wanted)
    has = "embed_tokens.weight" in load_file(tmp_path / "second" / "model.safetensors")
    assert has == (second == "speculators")


def test_a_head_keeps_an_embedding_of_its_own(verifier, tmp_path):
    stored(tmp_path / "head")
    file = tmp_path / "head" / "model.safetensors"
    save_file(load_file(file) | {"embed_tokens.weight": torch.randn(97, 32)}, file)
    wanted = head_logits(tmp_path / "head")
    for engine in ("vllm", "speculators"):
        export_drafter(str(tmp_path / "head"), tmp_path / engine, engine, verifier)
        assert torch.equal(head_logits(tmp_path / engine), wanted)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: it takes the target's embedding instead"):
        export_drafter(str(tmp_path / "head"), tmp_path / "sglang", "sglang", verifier)


@pytest.mark.filterwarnings("ignore:.*is not set")
def test_open_hidden_states_are_written_out(tmp_path):
    """The paper's, of a target that is deep enough; and texts as long as the target's."""
    deep = fresh("llama", num_hidden_layers=7)
    deep.save_pretrained(tmp_path / "deep")
    stored(tmp_path / "head")
    edit(tmp_path / "head", {IDS: None, "eagle_config": None, "max_position_embeddings": 64})
    (tmp_path / "head" / "drafter.json").unlink()
    for engine in ENGINES:
        export_drafter(str(tmp_path / "head"), tmp_path / engine, engine, str(tmp_path / "deep"))
        document = config_of(tmp_path / engine)
        assert document[IDS] == [2, 3, 4]
        assert document.get("transformer_layer_config", document)["max_position_embeddings"] == 256


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eagle3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_that_no_engine_knows_is_refused(verifier, tmp_path, capsys, name, engine):
    """Nothing is left behind of what is refused; a head that an engine does know is the same head there."""
    save_student(new(name), tmp_path / "head")
    asked = ["export", str(tmp_path / "head"), str(tmp_path / "out"), "--to", engine, "--target", verifier]
    if main(asked) == 0:
        assert torch.equal(head_logits(tmp_path / "out"), head_logits(tmp_path / "head"))
        return
    said = capsys.readouterr().err
    assert "cannot take" in said
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


BLOCKS = {"parallel": {"layers": [0, 1, 2]}, "dflash": {"layers": [1, 2]}}
"""Heads of several tokens from one forward, which engines can hand over hidden states to."""


@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_an_exported_parallel_head_is_complete(verifier, tmp_path, engine):
    """It names the target that was asked for, and has the names of tensors that speculators knows."""
    save_student(new("parallel", **BLOCKS["parallel"]), tmp_path / "head")
    export_drafter(str(tmp_path / "head"), tmp_path / "out", engine, verifier, tokens=2)
    said = config_of(tmp_path / "out")["speculators_config"]
    assert said["verifier"] == {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]}
    assert said["proposal_methods"][0]["speculative_tokens"] == 2
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("midlayer") for name in tensors)
    assert ("embed_tokens.weight" in tensors) == (engine == "speculators")
    assert torch.equal(head_logits(tmp_path / "out"), head_logits(tmp_path / "head"))


@pytest.mark.filterwarnings("ignore:.*is not set")
def test_open_hidden_states_of_a_parallel_head_are_written_out(tmp_path):
    eight = saved(tmp_path / "eight", num_hidden_layers=8)
    save_student(new("parallel", layers=[1, 2, 3]), tmp_path / "head")
    edit(tmp_path / "head", {IDS: None})
    export_drafter(str(tmp_path / "head"), tmp_path / "out", "vllm", str(eight))
    assert config_of(tmp_path / "out")[IDS] == [2, 4, 5]


@pytest.mark.parametrize(
    ("name", "changes"), [("parallel", {IDS: [2, 1]}), ("dflash", {"dflash_config.target_layer_ids": [1, 0]})]
)
def test_hidden_states_in_another_order_are_refused(verifier, tmp_path, name, changes):
    """csdraft fuses them in the order of the numbers, engines in the target's."""
    save_student(new(name, layers=[1, 2]), tmp_path / "head")
    export_drafter(str(tmp_path / "head"), tmp_path / "before", "vllm", verifier)
    edit(tmp_path / "head", changes)
    with pytest.raises(ValueError, match=r"after blocks \[2, 1\] must rise"):
        export_drafter(str(tmp_path / "head"), tmp_path / "after", "vllm", verifier)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 128}, "vocab_size=97, the target .* has 128"),
        ({"hidden_size": 64}, "target_hidden_size=32, the target .* has 64"),
        ({"num_hidden_layers": 2}, "the target has 2 blocks"),
    ],
)
def test_another_target_of_a_head_of_several_tokens_is_refused(tmp_path, name, changes, says):
    save_student(new(name, **BLOCKS[name]), tmp_path / "head")
    other = saved(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=says):
        export_drafter(str(tmp_path / "head"), tmp_path / "out", "vllm", str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BLOCKS)
def test_more_tokens_than_it_drafts_are_refused(verifier, tmp_path, name):
    head = new(name, **BLOCKS[name], steps=2)
    save_student(head, tmp_path / "head")
    with pytest.raises(ValueError, match="drafts at most 2 per round: use --tokens 2"):
        export_drafter(str(tmp_path / "head"), tmp_path / "out", "vllm", verifier, tokens=3)
    assert '"num_speculative_tokens": 2' in serving("me/head", tmp_path / "head", target())["vLLM"]


def test_vllm_is_told_that_a_head_drafts_in_one_forward(verifier, tmp_path):
    """Otherwise it drafts with a parallel head as with an EAGLE-3 head, token after token, and keeps fewer of them."""
    for name, options in BLOCKS.items():
        save_student(new(name, **options), tmp_path / name)
        command = export_drafter(str(tmp_path / name), tmp_path / f"{name}-out", "vllm", verifier, tokens=2)
        in_card = serving("me/head", tmp_path / name, target())["vLLM"]
        for said in (command, in_card):
            assert json.loads(said.split("'")[1]).get("parallel_drafting") is (True if name == "parallel" else None)
    assert "parallel_drafting" not in serving("me/head", stored(tmp_path / "eagle3"), target())["vLLM"]


def test_others_may_read_what_is_written(verifier, tmp_path):
    (tmp_path / "plain").mkdir()
    export_drafter(str(stored(tmp_path / "head")), tmp_path / "out", "vllm", verifier)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_medusa_is_refused_with_the_reason(verifier, tmp_path):
    save_student(new("medusa"), tmp_path / "head")
    with pytest.raises(ValueError, match="does not load medusa heads of this layout; decode with csdraft"):
        export_drafter(str(tmp_path / "head"), tmp_path / "out", "vllm", verifier)


# What engines refuse, row by row.


def edit(folder: Path, changes: dict[str, Any]) -> None:
    """Changes config.json at places such as `a.b`; None takes a key away."""
    document = config_of(folder)
    for place, value in changes.items():
        *parts, last = place.split(".")
        inner = document
        for part in parts:
            inner = inner[int(part)] if part.isdigit() else inner[part]
        inner.pop(last, None)
        if value is not None:
            inner[last] = value
    (folder / "config.json").write_text(json.dumps(document))


def faults(folder: Path, engine: str, sizes: ServedTarget | None = SIZES) -> list[str]:
    """What `csdraft inspect` says of an engine: that csdraft cannot read the folder, or why the engine would not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            head: Any = load_model(str(folder))
        except ValueError as error:
            return [str(error)]
    return head.faults(engine, config_of(folder), load_file(folder / "model.safetensors"), sizes)


@pytest.fixture(scope="module")
def good(tmp_path_factory, verifier) -> Path:
    """A head with all norms, as exported for each engine."""
    folder = tmp_path_factory.mktemp("good")
    stored(folder / "head", norm_before_fc=True, norm_output=True)
    for engine in ENGINES:
        export_drafter(str(folder / "head"), folder / engine, engine, verifier)
    return folder


@pytest.fixture
def exported(good, tmp_path) -> Any:
    def of(engine: str) -> Path:
        shutil.copytree(good / engine, tmp_path / engine, dirs_exist_ok=True)
        return tmp_path / engine

    return of


BOTH, FORMAT = ("vllm", "sglang"), "speculators"
LAYER = "transformer_layer_config"
KEYS: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BOTH, {"architectures": ["MistralForCausalLM"]}, r"architectures\[0\]=.*'LlamaForCausalLMEagle3'"),
    (BOTH, {"architectures": None}, r"architectures\[0\]="),
    (("sglang",), {"architectures": ["LlamaForCausalLM"]}, r"architectures\[0\]="),
    (("sglang",), {"architectures": ["Eagle3LlamaForCausalLM"]}, r"architectures\[0\]="),
    (BOTH, {"model_type": None}, "model_type=None must be 'llama'"),
    (BOTH, {"num_hidden_layers": 32}, "num_hidden_layers=32"),
    (BOTH, {"num_hidden_layers": None}, "num_hidden_layers=None"),
    (BOTH, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (BOTH, {"rope_theta": 5.0}, "rope_theta=5.0 must be 10000.0"),
    (BOTH, {"draft_vocab_size": None}, "draft_vocab_size=None must be 60"),
    (BOTH, {"num_aux_hidden_states": 2}, "num_aux_hidden_states=2 must be 3"),
    (BOTH, {IDS: [0, 2, 1], "eagle_config." + IDS: [-1, 1, 0]}, "must rise"),
    (BOTH, {IDS: [1, 1, 2], "eagle_config." + IDS: [0, 0, 1]}, "must rise"),
    (BOTH, {IDS: [0, 1, 3], "eagle_config." + IDS: [-1, 0, 2]}, "the target has 3 blocks"),
    (("vllm",), {IDS: None}, rf"{IDS}=None must be \[0, 1, 2\]"),
    (("sglang",), {"eagle_config." + IDS: None}, r"eagle_config.*=None must be \[-1, 0, 1\]"),
    (("sglang",), {"eagle_config": None}, r"must be \[-1, 0, 1\]"),
    (
        ("sglang",),
        {"eagle_config." + IDS: [0, 1, 2]},
        r"eagle_config.*must be \[-1, 0, 1\] for this head: `csdraft export`",
    ),
    (BOTH, {"eagle_config.use_aux_hidden_state": False}, "use_aux_hidden_state=False"),
    (BOTH, {"eagle_config.norm_before_fc": False}, "eagle_config.norm_before_fc=False must be True"),
    (BOTH, {"norm_output": None, "eagle_config.norm_output": True}, "norm_output=None must be True"),
    (("sglang",), {"bias": True}, "bias=True must be False"),
    (("sglang",), {"tie_word_embeddings": True}, "tie_word_embeddings=True must be False"),
    (("sglang",), {"norm_before_residual": True}, "norm_before_residual is true"),
    (BOTH, {"target_hidden_size": 0}, "target_hidden_size=0 must be 32"),
    (("sglang",), {"max_position_embeddings": 128}, "max_position_embeddings=128 is less than the target's 256"),
    ((FORMAT, "vllm"), {"speculators_model_type": None}, "speculators_model_type=None"),
    ((FORMAT, "vllm"), {"speculators_config": None}, r"proposal_methods\[0\]\.speculative_tokens is missing"),
    (
        (FORMAT, "vllm"),
        {"speculators_config.proposal_methods.0.speculative_tokens": None},
        "speculative_tokens is missing",
    ),
    ((FORMAT, "vllm"), {"speculators_config.verifier.name_or_path": None}, r"verifier\.name_or_path is missing"),
    ((FORMAT, "vllm"), {"norm_before_residual": None}, "norm_before_residual is missing"),
    ((FORMAT, "vllm"), {LAYER + ".model_type": None}, "model_type=None must be 'llama'"),
    ((FORMAT, "vllm"), {LAYER + ".num_hidden_layers": 2}, "num_hidden_layers=2"),
    ((FORMAT,), {"speculators_config.algorithm": "eagle"}, r"algorithm='eagle' must be 'eagle3'"),
    ((FORMAT,), {"speculators_config.default_proposal_method": None}, "default_proposal_method=None"),
    ((FORMAT,), {"speculators_config.proposal_methods.0.proposal_type": "tree"}, "proposal_type='tree'"),
    ((FORMAT,), {"speculators_config.verifier.architectures": None}, r"verifier\.architectures is missing"),
    ((FORMAT,), {"speculators_config.verifier.architectures": "A"}, r"verifier\.architectures is missing"),
    *(
        ((FORMAT, "vllm"), {key: right, f"{LAYER}.{key}": wrong}, rf"{LAYER}\.{key}={wrong!r} must be")
        for key, right, wrong in [
            ("model_type", "llama", "mistral"),
            ("num_hidden_layers", 1, 2),
            ("hidden_act", "silu", "gelu"),
            ("rope_theta", 10000.0, 5.0),
            ("num_aux_hidden_states", 3, 2),
        ]
    ),
    ((FORMAT, "vllm"), {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
    ((FORMAT,), {"draft_vocab_size": None}, "draft_vocab_size is missing"),
    (("sglang",), {}, "reads no folders of speculators"),
]
ROWS = [(engine, changes, says) for engines, changes, says in KEYS for engine in engines]


@pytest.mark.parametrize(("engine", "changes", "says"), ROWS, ids=lambda value: str(value)[:40])
def test_a_config_that_an_engine_would_refuse(exported, engine, changes, says):
    in_format = any(word in says + str(changes) for word in ("speculators", LAYER)) or engine == FORMAT
    in_format |= "residual is missing" in says
    folder = exported(FORMAT if in_format else engine)
    assert faults(folder, engine) == [] or not changes
    edit(folder, changes)
    found = "\n".join(faults(folder, engine))
    assert re.search(says, found, re.S), found


UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("vllm", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("vllm", {"model_type": "qwen3"}, r"lacks midlayer\.self_attn\.k_norm\.weight"),
    *(("vllm", {key: None}, "has shape") for key in ("hidden_size", "intermediate_size", "num_attention_heads")),
    *(("vllm", {key: 64}, "has shape") for key in ("hidden_size", "intermediate_size", "target_hidden_size")),
    *(("vllm", {key: 2}, "has shape") for key in ("num_attention_heads", "head_dim")),
    ("vllm", {"num_key_value_heads": 4}, r"k_proj\.weight has shape"),
    ("vllm", {"hidden_size": "wide"}, "'hidden_size'.*'wide'"),
    ("vllm", {"vocab_size": None}, "vocab_size=None"),
    ("vllm", {"vocab_size": 96}, "different tokens below 96"),
    *(("vllm", {"draft_vocab_size": rows}, rf"d2t has shape .*\({rows},\)") for rows in (50, 98)),
    ("vllm", {"draft_vocab_size": "all"}, "draft_vocab_size='all'"),
    ("vllm", {"norm_before_fc": False}, r"not know.*input_norm\.weight"),
    ("vllm", {"fc_norm": True}, r"lacks fc_norm\.0\.weight"),
    ("vllm", {"fc_norm": "yes"}, "fc_norm='yes'"),
    ("vllm", {"attention_bias": True}, r"lacks .*k_proj\.bias"),
    ("vllm", {"mlp_bias": True}, r"lacks .*down_proj\.bias"),
    ("vllm", {"logit_scale": 0.5}, "logit_scale=0.5"),
    (FORMAT, {"speculators_model_type": "dflash"}, "aux_hidden_state_layer_ids=None"),
    *((FORMAT, {LAYER: value}, "vocab_size=None") for value in (None, [])),
    (FORMAT, {LAYER + ".hidden_size": 16}, "has shape"),
    (FORMAT, {IDS: [0, 1]}, r"fc\.weight has shape"),
]


@pytest.mark.parametrize(("layout", "changes", "says"), UNREADABLE, ids=lambda value: str(value)[:40])
def test_a_config_that_csdraft_cannot_read_is_of_no_engine(exported, layout, changes, says):
    folder = exported(layout)
    edit(folder, changes)
    with pytest.raises(ValueError, match=says):
        load_model(str(folder))


def test_two_hidden_states_and_another_vocabulary_in_the_layout_of_speculators(verifier, tmp_path):
    """vLLM takes 3 hidden states if the layer's keys name no number."""
    Eagle3Head.of(new_head(layers=(0, 1), fc_norm=True)).save(tmp_path / "head")
    export_drafter(str(tmp_path / "head"), tmp_path / "out", FORMAT, verifier)
    assert faults(tmp_path / "out", FORMAT) == []
    edit(tmp_path / "out", {IDS: None})
    assert "it would fuse 3 hidden states" in "".join(faults(tmp_path / "out", FORMAT))
    edit(tmp_path / "out", {IDS: [0, 1]})
    edit(tmp_path / "out", {LAYER + ".num_aux_hidden_states": None, LAYER + ".vocab_size": 98})
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"embed_tokens.weight": torch.ones(98, 32), "t2d": torch.ones(98).bool()}, file)
    assert "num_aux_hidden_states=None must be 2" in "".join(faults(tmp_path / "out", "vllm"))
    assert "vocab_size=98, the target target has 97" in "".join(faults(tmp_path / "out", "vllm"))


def test_norms_and_widths_that_the_package_takes_for_others(verifier, tmp_path):
    stored(tmp_path / "head", norm_before_fc=True, fc_norm=True)
    asked = (str(tmp_path / "head"), tmp_path / "out")
    with pytest.raises(ValueError, match="norm_before_fc and fc_norm are both true"):
        export_drafter(*asked, FORMAT, verifier)
    export_drafter(*asked, "vllm", verifier)


def test_sglang_leaves_out_a_matrix_of_one_hidden_state(verifier, tmp_path):
    Eagle3Head.of(new_head(layers=(1,))).save(tmp_path / "head")
    with pytest.raises(ValueError, match="as wide as hidden_size, and then it leaves fc out"):
        export_drafter(str(tmp_path / "head"), tmp_path / "out", "sglang", verifier)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_that_is_missing_misshapen_or_of_another_type(good, engine):
    """Of t2d, which vLLM and SGLang do not look at, for speculators alone."""
    folder = good / engine
    head: Any = load_model(str(folder))
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name == "t2d" and engine != "speculators":
            continue
        less = {key: other for key, other in state.items() if key != name}
        other = less | {name: tensor.to(torch.int32 if name == "d2t" else torch.int8)}
        for wrong in (less, less | {name: tensor[:-1]}, *([] if name == "t2d" else [other])):
            found = "".join(head.faults(engine, config_of(folder), wrong, SIZES))
            assert name.replace("midlayer.", "layers.0.") in found


def test_tensors_that_no_engine_looks_for(good):
    for engine in ENGINES:
        folder = good / engine
        head: Any = load_model(str(folder))
        state = load_file(folder / "model.safetensors") | {"fc.bias": torch.zeros(32)}
        found = head.faults(engine, config_of(folder), state)
        assert "fc.bias is not a tensor that it reads" in "".join(found)


def test_names_that_one_engine_knows_and_another_does_not(exported):
    """A prefix that vLLM puts there itself; the layer's name in the original code, which speculators does not know."""
    for engine, takes in (("vllm", False), ("sglang", True)):
        folder = exported(engine)
        state = load_file(folder / "model.safetensors")
        moved = {name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}": t for name, t in state.items()}
        save_file(moved, folder / "model.safetensors")
        assert (faults(folder, engine) == []) is takes
        numbered = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in state.items()}
        save_file(numbered, folder / "model.safetensors")
        assert faults(folder, engine) == []
    folder = exported("speculators")
    state = load_file(folder / "model.safetensors")
    save_file({name.replace("layers.0.", "midlayer."): t for name, t in state.items()}, folder / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight is missing" in "".join(faults(folder, "speculators"))
    save_file({name: t for name, t in state.items() if name != "embed_tokens.weight"}, folder / "model.safetensors")
    assert faults(folder, "speculators") == ["embed_tokens.weight is missing"]
    assert faults(folder, "vllm") == []


@pytest.mark.parametrize("change", [lambda d2t: d2t + 40, lambda d2t: -torch.arange(60)])
def test_offsets_that_lead_nowhere(exported, change):
    for engine in ENGINES:
        folder = exported(engine)
        state = load_file(folder / "model.safetensors")
        save_file(state | {"d2t": change(state["d2t"])}, folder / "model.safetensors")
        assert "d2t must hold offsets" in "".join(faults(folder, engine))
    state["t2d"] = ~state["t2d"]
    save_file(state, folder / "model.safetensors")
    assert "t2d must be true for the 60 tokens of d2t" in "".join(faults(folder, "speculators"))


def test_a_full_vocabulary_has_no_offsets(verifier, tmp_path):
    stored(tmp_path / "head", draft_vocab=97)
    file = tmp_path / "head" / "model.safetensors"
    assert faults(tmp_path / "head", "vllm") == faults(tmp_path / "head", "sglang") == []
    plain = load_file(file)
    save_file(plain | {"d2t": torch.zeros(97, dtype=torch.long)}, file)
    assert "d2t is not a tensor" in "".join(faults(tmp_path / "head", "vllm"))
    for engine in ENGINES:  # an export leaves it out
        export_drafter(str(tmp_path / "head"), tmp_path / engine, engine, verifier)
        assert "d2t" not in load_file(tmp_path / engine / "model.safetensors")
    save_file(plain | {"d2t": torch.arange(96, -1, -1) - torch.arange(97)}, file)
    with pytest.raises(ValueError, match="d2t reorders all 97 tokens"):
        load_model(str(tmp_path / "head"))


def test_offsets_of_another_type_are_written_as_engines_read_them(verifier, tmp_path):
    stored(tmp_path / "head")
    file = tmp_path / "head" / "model.safetensors"
    plain = load_file(file)
    save_file(plain | {"d2t": plain["d2t"].int()}, file)
    export_drafter(str(tmp_path / "head"), tmp_path / "out", "vllm", verifier)
    found = load_file(tmp_path / "out" / "model.safetensors")["d2t"]
    assert found.dtype == torch.int64
    assert torch.equal(found, plain["d2t"])


def test_a_head_of_another_width_brings_its_embedding(tmp_path):
    """SGLang keeps it then, since the target's does not fit; speculators knows one width only."""
    shutil.copytree(stored(tmp_path / "head"), tmp_path / "wide")
    edit(tmp_path / "wide", {"target_hidden_size": 64})
    file = tmp_path / "wide" / "model.safetensors"
    state = load_file(file) | {"fc.weight": torch.zeros(32, 3 * 64)}
    save_file(state, file)
    wide = replace(SIZES, hidden_size=64)
    assert "embed_tokens.weight is missing" in "".join(faults(tmp_path / "wide", "vllm", wide))
    save_file(state | {"embed_tokens.weight": torch.zeros(97, 32)}, file)
    assert faults(tmp_path / "wide", "vllm", wide) == faults(tmp_path / "wide", "sglang", wide) == []
    with pytest.raises(ValueError, match=r"target_hidden_size=64 must be hidden_size=32 .*--to vllm"):
        export_drafter(
            str(tmp_path / "wide"), tmp_path / "out", "speculators", str(saved(tmp_path / "t", hidden_size=64))
        )


def saved(folder: Path, **changes: Any) -> Path:
    fresh("llama", **{"num_hidden_layers": 3} | changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 128}, "vocab_size=97, the target .* has 128"),
        ({"hidden_size": 64}, "target_hidden_size=32, the target .* has 64"),
        ({"num_hidden_layers": 2}, "the target has 2 blocks"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_another_target_is_refused(tmp_path, engine, changes, says):
    stored(tmp_path / "head")
    other = saved(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=says):
        export_drafter(str(tmp_path / "head"), tmp_path / "out", engine, str(other))
    assert not (tmp_path / "out").exists()


def test_ids_of_sglangs_trainers_count_from_0(tmp_path):
    """A folder that has them in eagle_config alone; another reading would take each state one block too early."""
    wanted = head_logits(stored(tmp_path / "head"))
    edit(tmp_path / "head", {IDS: None})
    with pytest.warns(UserWarning, match="count blocks from 0: assumed are the hidden states after blocks 0, 1, 2"):
        found = head_logits(tmp_path / "head")
    assert torch.equal(found, wanted)
    edit(tmp_path / "head", {"eagle_config." + IDS: [0, 1, 2]})
    with pytest.warns(UserWarning, match="after blocks 1, 2, 3"):
        assert not torch.equal(head_logits(tmp_path / "head"), wanted)


# Whole models.


def test_a_whole_student_is_exported_with_the_targets_tokenizer(verifier, tmp_path):
    student = noisy(target(), 0.3)
    student.save_pretrained(tmp_path / "student")
    for engine in BOTH:
        export_drafter(str(tmp_path / "student"), tmp_path / engine, engine, verifier)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / engine)
        assert torch.equal(model_logits(loaded), model_logits(student))
        assert torch.equal(model_logits(load_model(str(tmp_path / engine))), model_logits(student))
        assert (tmp_path / engine / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="speculators has heads only"):
        export_drafter(str(tmp_path / "student"), tmp_path / "out", "speculators", verifier)


def test_an_adapter_is_merged(verifier, tmp_path):
    base = noisy(target(), 0.3)
    base.save_pretrained(tmp_path / "base")
    student = make_student(target(), str(tmp_path / "base"), peft={"r": 4, "lora_alpha": 8})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_student(student, tmp_path / "student", tokenizer())
    unmerged = model_logits(student.eval())
    assert not torch.allclose(unmerged, model_logits(base), atol=0.1)
    merged = student.merge_and_unload(safe_merge=True)
    for engine in BOTH:
        export_drafter(str(tmp_path / "student"), tmp_path / engine, engine, verifier)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / engine)
        assert not (tmp_path / engine / "adapter_config.json").exists()
        assert torch.equal(model_logits(loaded), model_logits(merged))
        assert torch.allclose(model_logits(loaded), unmerged, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_student_gets_the_targets_embedding(tmp_path, tied):
    model = fresh("llama", num_hidden_layers=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "target")
    tokenizer().save_pretrained(tmp_path / "target")
    student = make_student(model, init={"from_target": {"layers": [0, 2], "tie_to_target": True}})
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_student(student, tmp_path / "student")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "student" / "model.safetensors")
    for engine in BOTH:
        export_drafter(str(tmp_path / "student"), tmp_path / engine, engine, str(tmp_path / "target"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / engine)
        assert torch.equal(model_logits(loaded), model_logits(student.eval()))
        assert "model.embed_tokens.weight" in load_file(tmp_path / engine / "model.safetensors")
    with pytest.raises(ValueError, match="uses the embedding and output layer of"):
        export_drafter(str(tmp_path / "student"), tmp_path / "out", "vllm", str(saved(tmp_path / "other", seed=3)))


def test_what_is_no_model_of_its_own_is_refused(verifier, tmp_path):
    student = make_student(target(), init=on_target([0, 2]), peft={"r": 4})
    save_student(student, tmp_path / "self")
    with pytest.raises(ValueError, match="an adapter for the target's own layers, which engines do not share"):
        export_drafter(str(tmp_path / "self"), tmp_path / "out", "vllm", verifier)
    CascadeDrafter([ModelDrafter(noisy(target())), MaxGram()]).save_pretrained(tmp_path / "cascade")
    with pytest.raises(ValueError, match=r"is a cascade, which no engine runs; export one of .*/models"):
        export_drafter(str(tmp_path / "cascade"), tmp_path / "out", "vllm", verifier)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "changes", "says"),
    [
        ("vllm", {"vocab_size": 104}, "vocab_size=104, the target .* has 97, .*use_heterogeneous_vocab"),
        ("sglang", {"vocab_size": 104}, "vocab_size=104, the target .* has 97, .*resize_token_embeddings"),
        ("sglang", {"max_position_embeddings": 128}, "max_position_embeddings=128 is less than the target's 256"),
    ],
)
def test_a_student_of_other_sizes_is_refused(verifier, tmp_path, engine, changes, says):
    fresh("llama", **changes).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=says):
        export_drafter(str(tmp_path / "student"), tmp_path / "out", engine, verifier)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", BOTH)
def test_a_student_of_another_tokenizer_is_refused(verifier, tmp_path, engine):
    saved(tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    document = json.loads(file.read_text())
    words = document["model"]["vocab"]
    words["!"], words["#"] = words["#"], words["!"]
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="differ in 2 tokens, such as '!': 5 in the drafter, 3 in the target"):
        export_drafter(str(tmp_path / "student"), tmp_path / "out", engine, verifier)


def test_encoder_decoders_are_refused(verifier, tmp_path):
    fresh("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="model_type='t5' is an encoder-decoder"):
        export_drafter(str(tmp_path / "t5"), tmp_path / "out", "vllm", verifier)
    with pytest.raises(ValueError, match="is an encoder-decoder, and no engine drafts for one"):
        export_drafter(verifier, tmp_path / "out", "vllm", str(tmp_path / "t5"))


def test_a_whole_model_without_a_target_to_compare():
    config = copy.deepcopy(target().config)
    config.architectures = ["LlamaForCausalLM"]  # as `save_pretrained` sets it
    assert not [*whole_faults("vllm", config), *whole_faults("sglang", config)]


# The card, and the command.


def test_a_card_has_the_commands_of_the_engines_that_take_it(tmp_path):
    name, model = "me/head", copy.deepcopy(target())
    model.config._name_or_path = "me/target"
    commands = serving(name, stored(tmp_path / "head"), model)
    assert list(commands) == ["vLLM", "SGLang"]
    assert "vllm serve me/target" in commands["vLLM"]
    assert '"model": "me/head"' in commands["vLLM"]
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path me/head" in commands["SGLang"]
    assert list(serving(name, stored(tmp_path / "vllm", norm_before_residual=True), model)) == ["vLLM"]
    save_student(new("medusa"), tmp_path / "medusa")
    save_student(noisy(model), tmp_path / "whole")
    assert serving(name, tmp_path / "medusa", model) == serving(name, tmp_path / "whole", model) == {}


def test_the_command_writes_and_says_how_to_serve(verifier, tmp_path, capsys):
    stored(tmp_path / "head")
    asked = ["export", str(tmp_path / "head"), str(tmp_path / "out"), "--target", verifier]
    assert main([*asked, "--to", "vllm", "--tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert f"vllm serve {verifier} --speculative-config" in said
    assert '"num_speculative_tokens": 5' in said
    assert main([*asked, "--to", "vllm"]) == 2
    assert "is there already; give a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked[:2], str(tmp_path / "new"), *asked[3:], "--to", "vllm", "--tokens", "0"])
    assert "--tokens: '0' is not a whole number of at least 1" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "--target", verifier]) == 0
    assert capsys.readouterr().out.count("loads it") == 2
    edit(tmp_path / "out", {"norm_before_residual": True})
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "would not: norm_before_residual is true" in capsys.readouterr().out


def test_commands_of_the_engines():
    assert serve_command("speculators", "eagle3", "t", "a b", 3) == "vllm serve 'a b'"
    said = serve_command("sglang", "STANDALONE", "t", "d", 3)
    assert "--speculative-algorithm STANDALONE --speculative-draft-model-path d --speculative-num-steps 3" in said
    assert said.endswith("--speculative-num-draft-tokens 4")
    whole = serve_command("vllm", "draft_model", "t", "d", 3)
    assert json.loads(whole.split("'")[1]) == {"method": "draft_model", "model": "d", "num_speculative_tokens": 3}


def test_a_target_that_says_no_length(verifier):
    assert served_target(verifier).positions == 256
    assert not list(context_fault(None, replace(SIZES, positions=None)))
    assert list(context_fault(None, SIZES))
