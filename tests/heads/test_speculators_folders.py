"""Folders of speculators with heads of several tokens: what is written and read, and what engines refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdraft.cli import main
from csdraft.heads.stored_head import head_at
from csdraft.models import load_model
from csdraft.trainers.students import save_student
from tests.heads.kinds import new
from tests.heads.learned import naive, new_head, target, texts
from tests.heads.test_engine_rows import found, write
from tests.tiny import tokenizer

KINDS = {"dflash": {"layers": [1, 2], "blocks": 2}, "parallel": {"layers": [0, 1, 2], "blocks": 2}}
ENGINES = ("vllm", "speculators")
LAYER, PLANS, IDS = "transformer_layer_config", "speculators_config", "aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Heads as they are saved, and as exported for speculators; the target."""
    folder = tmp_path_factory.mktemp("good")
    target().save_pretrained(folder / "target")
    tokenizer().save_pretrained(folder / "target")
    for name, options in KINDS.items():
        for rows in (60, 97):
            save_student(new(name, draft_vocab=rows, **options), folder / f"{name}-{rows}")
            assert exported(folder, folder / f"{name}-{rows}", folder / f"{name}-{rows}-out")
    return folder


def exported(good: Path, head: Path, out: Path, engine: str = "speculators") -> bool:
    return main(["export", str(head), str(out), "--to", engine, "--target", str(good / "target")]) == 0


@pytest.fixture
def copied(good, tmp_path) -> Any:
    def of(name: str) -> Path:
        out = tmp_path / name
        out.mkdir()
        for file in (good / name).iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return out

    return of


def drafted(folder: Path) -> list[torch.Tensor]:
    head: Any = load_model(str(folder)).bind(target())
    text = texts()[0, :9].tolist()
    return [naive(head, text, [5] * step)[0] for step in range(3)]


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(*pair) for pair in zip(drafted(one), drafted(other), strict=True))


@pytest.mark.parametrize("name", ["dflash-60", "dflash-97", "parallel-60", "parallel-97"])
def test_an_export_is_the_same_head_and_goes_back(good, tmp_path, name):
    assert same(good / f"{name}-out", good / name)
    for engine in ENGINES:
        assert found(good / f"{name}-out", engine) == ""
    assert re.search("reads no folders of speculators|does not load parallel", found(good / f"{name}-out", "sglang"))
    kept = json.loads((good / f"{name}-out" / "drafter.json").read_text())
    assert kept["base"] == json.loads((good / name / "drafter.json").read_text())["base"]
    assert exported(good, good / f"{name}-out", tmp_path / "vllm", "vllm")
    assert same(tmp_path / "vllm", good / name)


def test_a_dflash_folder_has_the_keys_of_the_package(good):
    document = json.loads((good / "dflash-60-out" / "config.json").read_text())
    wanted = {"speculators_model_type": "dflash", "block_size": 4, IDS: [1, 2], "mask_token_id": 0}
    wanted |= {"draft_vocab_size": 60, "sample_from_anchor": False, "sliding_window_non_causal": True}
    assert {key: document[key] for key in wanted} == wanted
    assert "dflash_config" not in document
    layer = document[LAYER]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["head_dim"]) == ("qwen3", 2, 8)
    state = load_file(good / "dflash-60-out" / "model.safetensors")
    assert {"d2t", "t2d", "lm_head.weight"} <= state.keys()
    assert (
        not {"embed_tokens.weight", "lm_head.weight"} & load_file(good / "dflash-97-out" / "model.safetensors").keys()
    )


def test_copies_of_the_target_in_a_dflash_folder_are_not_read(good, copied):
    """Earlier versions of the package wrote them; it takes the target's in any case."""
    folder = copied("dflash-97-out")
    copies = {"embed_tokens.weight": torch.ones(97, 32), "lm_head.weight": torch.ones(97, 32)}
    copies |= {"verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(97, 32)}
    write(folder, load_file(folder / "model.safetensors") | copies)
    assert same(folder, good / "dflash-97")
    assert "embed_tokens.weight: it takes the target's" in found(folder, "speculators")


@pytest.mark.parametrize("name", ["eagle3", "parallel"])
def test_layers_of_qwen_3_are_kept(good, tmp_path, name):
    """Queries and keys are normed, which shows in the tensors; SGLang does not know such heads."""
    stored = tmp_path / "head"
    if name == "eagle3":
        save_student(new_head(layers=(0, 1, 2), qk_norm=True), stored)
    else:
        save_student(new("parallel", **KINDS["parallel"]), stored)
        state = load_file(stored / "model.safetensors")
        norms = {f"layers.{i}.self_attn.{x}_norm.weight": torch.linspace(0.5, 1.5, 8) for i in range(2) for x in "qk"}
        document = json.loads((stored / "config.json").read_text())
        write(stored, state | norms, **{LAYER: document[LAYER] | {"model_type": "qwen3"}})
    without = tmp_path / "llama"
    head: Any = load_model(str(stored))
    assert head.options.qk_norm
    assert "queries and keys" in head.described()["norms"]
    head.save(without)
    assert same(without, stored)
    assert exported(good, stored, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document[LAYER]["model_type"] == "qwen3"
    assert same(tmp_path / "out", stored)
    assert found(tmp_path / "out", "vllm") == found(tmp_path / "out", "speculators") == ""
    assert found(stored, "sglang") != ""
    state = load_file(tmp_path / "out" / "model.safetensors")
    save_file({key: t for key, t in state.items() if "q_norm" not in key}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks .*self_attn\.q_norm\.weight"):
        load_model(str(tmp_path / "out"))


def test_a_qwen_3_head_in_the_original_layout_is_for_vllm(good, tmp_path):
    save_student(new_head(layers=(0, 1, 2), qk_norm=True), tmp_path / "head")
    assert found(tmp_path / "head", "vllm") == ""
    assert "qk_norm is true" in found(tmp_path / "head", "sglang")
    assert not exported(good, tmp_path / "head", tmp_path / "out", "sglang")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "head", architectures=["LlamaForCausalLMEagle3"])
    assert "must be 'Eagle3Qwen3ForCausalLM'" in found(tmp_path / "head", "vllm")


# What a folder must say.

PLAN = {"proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}], "algorithm": "dflash"}
PLAN |= {"default_proposal_method": "greedy", "verifier": {"name_or_path": "t", "architectures": []}}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("dflash", "vllm", {PLANS: {}}, f"{PLANS}.proposal_methods"),
    ("dflash", "vllm", {PLANS: PLAN | {"verifier": {}}}, "verifier.name_or_path is missing"),
    ("dflash", "speculators", {PLANS: PLAN | {"algorithm": "eagle3"}}, "algorithm='eagle3' must be 'dflash'"),
    (
        "dflash",
        "speculators",
        {PLANS: PLAN | {"verifier": {"name_or_path": "t"}}},
        "verifier.architectures is missing",
    ),
    ("dflash", "vllm", {"sliding_window_non_causal": False}, "sliding_window_non_causal=False must be True"),
    (
        "dflash",
        "speculators",
        {"sliding_window_non_causal": False},
        "vLLM: sliding_window_non_causal=False must be",
    ),
    ("dflash", "vllm", {"sample_from_anchor": True}, "sample_from_anchor is true"),
    ("parallel", "vllm", {PLANS: PLAN | {"verifier": {}}}, "verifier.name_or_path is missing"),
    ("parallel", "speculators", {PLANS: PLAN}, "algorithm='dflash' must be 'peagle'"),
]


@pytest.mark.parametrize(("kind", "engine", "changes", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_an_engine_would_refuse(good, kind, engine, changes, says):
    folder = good / f"{kind}-60-out"
    head: Any = load_model(str(folder))
    if "sample_from_anchor" in changes:
        head = type(head).load(str(folder), json.loads((folder / "config.json").read_text()) | changes)
    document = json.loads((folder / "config.json").read_text()) | changes
    assert says in "\n".join(head.faults(engine, document, head.weights(str(folder)), None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_that_is_missing_or_misshapen(good, kind, engine):
    folder = good / f"{kind}-60-out"
    head: Any = load_model(str(folder))
    document, state = json.loads((folder / "config.json").read_text()), head.weights(str(folder))
    for name in state:
        if (engine, name) in {("vllm", "t2d"), ("vllm", "embed_tokens.weight")}:
            continue
        less = {key: tensor for key, tensor in state.items() if key != name}
        assert name in "".join(head.faults(engine, document, less)), name
        assert name in "".join(head.faults(engine, document, less | {name: state[name][:-1]})), name
    assert "x.weight is not a tensor" in "".join(head.faults(engine, document, state | {"x.weight": torch.ones(1)}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({IDS: None}, IDS),
        ({IDS: [0, 1]}, f"{IDS}=.*read the embeddings"),
        ({IDS: [1]}, r"fc\.weight has shape"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 97}, "mask_token_id=97"),
        ({"block_size": None}, "block_size"),
        ({"block_size": 1}, "block_size=1"),
        ({"draft_vocab_size": 50}, r"d2t has shape \(60,\)"),
        ({"draft_vocab_size": 0}, "draft_vocab_size=0"),
        ({"draft_vocab_size": "few"}, "draft_vocab_size='few'"),
        ({"sample_from_anchor": "no"}, "sample_from_anchor"),
        ({LAYER: None}, LAYER),
        ({LAYER: {"model_type": "gemma3"}}, "gemma3"),
        ({LAYER + ".layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({LAYER + ".num_hidden_layers": 3}, r"lacks layers\.2"),
        ({LAYER + ".num_hidden_layers": None}, "num_hidden_layers"),
        ({LAYER + ".vocab_size": 50}, "d2t must hold offsets"),
        ({"speculators_model_type": "dspark"}, "speculators_model_type='dspark'.*eagle3, peagle and dflash"),
        ({"speculators_model_type": "dflash2"}, "speculators_model_type='dflash2'"),
        ({"speculators_model_type": []}, "speculators_model_type"),
    ],
)
def test_a_tampered_dflash_folder_is_refused(copied, changes, says):
    folder = copied("dflash-60-out")
    document = json.loads((folder / "config.json").read_text())
    flat = {key: value for key, value in changes.items() if "." not in key}
    inner = {key.rpartition(".")[2]: value for key, value in changes.items() if "." in key}
    write(folder, **flat, **({LAYER: document[LAYER] | inner} if inner else {}))
    with pytest.raises(ValueError, match=says):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["d2t", "lm_head.weight", "fc.weight", "layers.1.self_attn.k_norm.weight"])
def test_an_incomplete_dflash_folder_is_refused(copied, name):
    for folder in (copied("dflash-60-out"), copied("dflash-60")):
        write(folder, {key: t for key, t in load_file(folder / "model.safetensors").items() if key != name})
        with pytest.raises(ValueError, match=name):
            load_model(str(folder))


# Rows of the published layouts.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_value_scale", 0.5), ("attention_sink_bias", True), ("final_logit_softcapping", 30.0),
        ("output_multiplier", 2.0), ("conv_kernel_size", 3), ("selector_rank", 8), ("projector_type", "domino"),
        ("is_causal", True), ("is_neox_style", False), ("use_gemma_norm", True),
    ],
)  # fmt: skip
def test_variants_of_dflash_that_compute_something_else_are_refused(copied, key, value):
    folder = copied("dflash-97")
    document = json.loads((folder / "config.json").read_text())
    for changes in ({key: value}, {"dflash_config": document["dflash_config"] | {key: value}}):
        write(folder, **document | changes)
        with pytest.raises(ValueError, match=key):
            load_model(str(folder))


def test_a_block_whose_first_token_predicts_is_for_csdraft_alone(copied):
    """vLLM refuses such DFlash heads, and SGLang would draft from the placeholders alone."""
    folder = copied("dflash-97")
    document = json.loads((folder / "config.json").read_text())
    write(folder, dflash_config=document["dflash_config"] | {"sample_from_anchor": True})
    for engine in ("vllm", "sglang"):
        assert "sample_from_anchor is true" in found(folder, engine)


def test_tensors_of_a_published_dflash_head(copied):
    """vLLM puts `model.` in front itself; SGLang takes the target's embedding and output layer."""
    folder = copied("dflash-97")
    assert found(folder, "vllm") == found(folder, "sglang") == ""
    state = load_file(folder / "model.safetensors")
    write(folder, {f"model.{name}": tensor for name, tensor in state.items()})
    assert "fc.weight is missing" in found(folder, "vllm")
    assert found(folder, "sglang") == ""
    write(folder, state | {"lm_head.weight": torch.ones(97, 32), "embed_tokens.weight": torch.ones(97, 32)})
    assert found(folder, "vllm") == ""
    assert found(folder, "sglang").count("it takes the target's instead") == 2
    assert "export with --to speculators" in found(folder, "speculators")


def test_the_number_of_hidden_states_of_a_parallel_head_is_said(good, tmp_path):
    """vLLM takes 3 unless it finds another number beside the keys of the layer."""
    save_student(new("parallel", layers=[0, 2]), tmp_path / "head")
    assert exported(good, tmp_path / "head", tmp_path / "out", "vllm")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document[LAYER]["num_aux_hidden_states"] == 2
    layer = {key: value for key, value in document[LAYER].items() if key != "num_aux_hidden_states"}
    write(tmp_path / "out", **{LAYER: layer})
    assert "num_aux_hidden_states=None must be 2" in found(tmp_path / "out", "vllm")


@pytest.mark.filterwarnings("ignore:.*unauthenticated")
def test_an_open_norm_before_residual_is_said(good, tmp_path):
    """speculators and vLLM have different defaults for an EAGLE-3 head."""
    save_student(new_head(layers=(0, 1, 2)), tmp_path / "head")
    assert exported(good, tmp_path / "head", tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    del document["norm_before_residual"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="norm_before_residual is not set: false is assumed"):
        head_at(str(tmp_path / "out"))
