"""A target's own next-token module: it drafts what the folder's tensors say, and the text stays the target's."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli._models import _drafter
from csdraft.heads.kinds.mtp import OWN
from csdraft.models import load_model
from csdraft.trees.best_first import BestFirst
from csdraft.trees.sampled import Sampled
from tests.heads import spied
from tests.heads.spied import (
    DRAWS,
    EVERY,
    FIXED,
    FORMS,
    GREEDY,
    LONG,
    SAMPLED,
    Spied,
    each_way,
    wrong_parent,
    wrong_target,
)
from tests.tiny import COMMON, ragged_batch, tiny

EXPERTS = COMMON | {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {"num_key_value_heads": 4}
MELLUM = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
MELLUM |= {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
SLIDING = {"mtp_layer_types": ["sliding_attention"], "sliding_window": 8}
SLIDING |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1}),
    "deepseek_v3 of three": (
        "DeepseekV3",
        EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_mtp_layers": 3},
    ),
    "glm4_moe": ("Glm4Moe", EXPERTS | {"n_routed_experts": 4, "head_dim": 8}),
    "mellum": ("Mellum", COMMON | MELLUM),
    "mellum sliding": ("Mellum", COMMON | MELLUM | SLIDING),
}
LAYERS, PROMPTS = 2, (20, 3, 11)
FOLDERS = TemporaryDirectory()
OF_EACH = pytest.mark.parametrize("family", [name for name in FAMILIES if "of three" not in name])
OF_TWO = pytest.mark.parametrize("family", ["deepseek_v3", "mellum sliding"])
"""One of each layout of the folder, with a different cache and mask."""
INNER = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "shared_head.norm": "norm"}
"""DeepSeek-V3's names of what a module has beside its layer, and Qwen3-Next's."""


def module_name(family: str, name: str, number: int = 0) -> str:
    """A tensor's name in the folder, of its name beside a decoder layer's in DeepSeek-V3."""
    if not family.startswith("mellum"):
        return f"model.layers.{LAYERS + number}.{name}"
    part = name.rpartition(".")[0]
    return f"mtp.{INNER[part]}.weight" if part in INNER else f"mtp.layers.0.{name}"


@cache
def folder(family: str) -> Path:
    """A target with a random module, as such checkpoints are published: in two files, experts one by one."""
    name, options = FAMILIES[family]
    modules = range(options.get("num_mtp_layers", 1))
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")._from_config(
        getattr(transformers, f"{name}Config")(**(options | {"num_hidden_layers": LAYERS + len(modules)}))
    )
    path = Path(FOLDERS.name, family)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            parameter.add_((0.2 if "norm" in key else 0.05) * torch.randn_like(parameter))
    made.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    own, width = {}, COMMON["hidden_size"]
    for number in modules:
        prefix = f"model.layers.{LAYERS + number}."
        layer = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        own |= {module_name(family, key.removeprefix(prefix), number): value for key, value in layer.items()}
        for part in ("enorm", "hnorm", "shared_head.norm"):
            own[module_name(family, f"{part}.weight", number)] = 1 + 0.2 * torch.randn(width)
        own[module_name(family, "eh_proj.weight", number)] = 0.3 * torch.randn(width, 2 * width)
        if not family.startswith("mellum"):  # whose copies DeepSeek-V3 has
            own[module_name(family, "embed_tokens.weight", number)] = state["model.embed_tokens.weight"].clone()
            own[module_name(family, "shared_head.head.weight", number)] = state["lm_head.weight"].clone()
    write(path, state, own)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    for key in ("layer_types", "mlp_layer_types"):
        if key in config:
            config[key] = config[key][:LAYERS]
    (path / "config.json").write_text(json.dumps(config))
    return path


def write(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Two files of weights and their index; one tensor of the module lies with the target's."""
    moved = max(own)
    files = {"model-00001-of-00002.safetensors": state | {moved: own[moved]}}
    files["model-00002-of-00002.safetensors"] = {key: value for key, value in own.items() if key != moved}
    for name, tensors in files.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    names = {key: name for name, tensors in files.items() for key in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}


@cache
def target(family: str) -> Any:
    made = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32).eval()
    made.generation_config.pad_token_id = 0
    return made


@cache
def learned(family: str) -> Any:
    """A copy of the bound module that has learned to draft what the target writes; tests must not change it."""
    made, ids = copy.deepcopy(OWN.bind(target(family))), texts(family)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        features = target(family)(ids, output_hidden_states=True).hidden_states[-1]
    made.mtp.requires_grad_(True)
    optimizer = torch.optim.AdamW(made.mtp.parameters(), 0.01)
    for _ in range(60):
        logits = made(ids[:, 1:], features[:, :-1], positions[:, 1:] - 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False)


@cache
def texts(family: str) -> Tensor:
    """(rows, length) the end of what the target writes after the prompts, greedily and not."""
    made = []
    for how in ({"do_sample": False}, {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 3}):
        torch.manual_seed(len(made))
        made.append(target(family).generate(**ragged_batch(PROMPTS), max_new_tokens=24, eos_token_id=None, **how))
    return torch.cat(made)[:, 17:]


def written(family: str, assistant: Any, rows: int = 3, **options: Any) -> Any:
    return target(family).generate(**ragged_batch(PROMPTS[:rows]), assistant=assistant, **FIXED, **options)


def greedy(family: str, rows: int = 3, how: Any = GREEDY) -> Tensor:
    return target(family).generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **how)


@torch.no_grad()
def without_cache(family: str, head: Any, text: list[int], path: list[int], read: Any) -> tuple[Tensor, Tensor]:
    """See `tests.heads.learned.naive`."""
    if tuple(path) in read:
        return read[tuple(path)]
    features = head.fuse({-1: target(family)(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1]})
    entries = list(text[1:])
    for drafted in [*path, None]:
        count = len(entries)
        output = head(torch.tensor([entries]), features[:, :count], torch.arange(count)[None])
        features = torch.cat([features, output.hidden_states[0][:, -1:]], 1)
        entries.append(drafted or 0)
    read[tuple(path)] = output.logits[0, -1], output.hidden_states[0][0, -1]
    return read[tuple(path)]


@torch.no_grad()
def by_hand(family: str, text: list[int], path: list[int]) -> Tensor:
    """(vocab,) logits after a text and drafted tokens, from the tensors in the folder."""
    own, model = tensors_of(folder(family)), target(family).model
    eps, options = model.config.rms_norm_eps, FAMILIES[family][1]
    kind = {"layer_type": options["mtp_layer_types"][0]} if "mtp_layer_types" in options else {}
    window = options.get("sliding_window", len(text) + len(path))

    def normed(hidden: Tensor, weight: Tensor) -> Tensor:
        return weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    part = {name: own[module_name(family, f"{name}.weight")] for name in INNER}
    layer = type(model.layers[1])(model.config, 1).eval()  # with experts, as layer 0 of DeepSeek-V3 is not
    prefix = module_name(family, "input_layernorm.weight").removesuffix("input_layernorm.weight")
    state = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    numbers = range(4)
    both = [[state.pop(f"mlp.experts.{i}.{name}.weight") for name in ("gate_proj", "up_proj")] for i in numbers]
    state["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
    downs = [state.pop(f"mlp.experts.{i}.down_proj.weight") for i in numbers]
    state["mlp.experts.down_proj"] = torch.stack(downs)
    layer.load_state_dict({key: value for key, value in state.items() if key in layer.state_dict()})
    assert layer.state_dict().keys() <= state.keys()
    features = target(family)(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1]
    entries = list(text[1:])
    for drafted in [*path, None]:
        embedded = own["model.embed_tokens.weight"][torch.tensor([entries])]
        joined = torch.cat([normed(embedded, part["enorm"]), normed(features, part["hnorm"])], -1) @ part["eh_proj"].T
        rotary = model.rotary_emb(joined, torch.arange(len(entries))[None], **kind)
        places = torch.arange(len(entries))
        mask = (places[:, None] >= places) & (places[:, None] - places < window)
        output = normed(
            layer(joined, attention_mask=mask[None, None], position_embeddings=rotary), part["shared_head.norm"]
        )
        features = torch.cat([features, output[:, -1:]], 1)
        entries.append(drafted or 0)
    return output[0, -1] @ own["lm_head.weight"].T


@OF_EACH
def test_it_computes_what_the_tensors_of_the_folder_say(family):
    head, text = OWN.bind(target(family)), texts(family)[0, :12].tolist()
    for path in ([], [5], [5, 9, 40]):
        found, _ = without_cache(family, head, text, path, {})
        assert torch.allclose(found, by_hand(family, text, path), atol=1e-4)


def test_its_first_token_is_that_of_transformers():
    """Of a family whose tensors transformers finds itself."""
    from transformers.modeling_layers import MtpModel

    family, text = "mellum", texts("mellum")[0, :12]
    theirs = MtpModel.from_pretrained(target(family)).eval()
    with torch.no_grad():
        states = target(family)(text[None, :-1], output_hidden_states=True).hidden_states[-1]
        places = torch.arange(1, 12)[None]
        _, logits, _ = theirs(text[None, 1:], states, None, places, None)
    assert torch.allclose(
        logits[0, -1], without_cache(family, OWN.bind(target(family)), text.tolist(), [], {})[0], atol=1e-4
    )


@OF_TWO
@FORMS
def test_drafts_are_those_of_a_forward_without_a_cache(monkeypatch, family, tree, rows):
    """With features dropped at random between rounds: nothing changes but speed."""
    monkeypatch.setattr(spied, "naive", lambda *given: without_cache(family, *given))
    kept, dropped = (Spied(learned(family), tree=tree, forget=forget) for forget in (False, True))
    plain = greedy(family, rows, LONG)
    assert torch.equal(written(family, kept, rows, **LONG), plain)
    assert torch.equal(written(family, dropped, rows, **LONG), plain)
    assert kept.drafts == dropped.drafts
    assert len(kept.errors) > 10 * rows
    assert max(kept.errors + dropped.errors) < 1e-4


@OF_TWO
@pytest.mark.parametrize("mutant", ["parent", "target"])
def test_a_feature_of_the_wrong_position_is_found(monkeypatch, family, mutant):
    owner, name, wrong = {
        "parent": (spied.feature_session, "_parents", wrong_parent),
        "target": (spied.feature_session.FeatureSession, "_of_target", wrong_target),
    }[mutant]
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(spied, "naive", lambda *given: without_cache(family, *given))
    looked = Spied(learned(family), tree=BestFirst(3, 9))
    written(family, looked, **GREEDY)
    assert max(looked.errors) > 1e-3


@OF_TWO
@pytest.mark.parametrize("rows", [1, 3])
@EVERY
def test_the_text_is_the_targets(family, rows, every):
    """Greedily and with coupled noise: by its name, as a chain, a tree, and a level of a cascade."""
    head, seeds = learned(family), {**SAMPLED, "row_seeds": SAMPLED["row_seeds"][:rows]}
    plain, drawn = greedy(family, rows), written(family, MaxGram(), rows, **seeds)
    drafters = (
        "mtp",
        ModelDrafter(head),
        ModelDrafter(head, tree=BestFirst(3, 12)),
        CascadeDrafter([head, MaxGram()]),
    )
    for drafter, draws in each_way(drafters, rows, every):
        found = written(family, drafter, rows, **(seeds if draws else GREEDY))
        assert torch.equal(found, drawn if draws else plain)


@OF_TWO
@DRAWS
@pytest.mark.parametrize("tree", [None, Sampled()], ids=["chain", "tree"])
def test_independent_draws_have_the_targets_distribution(monkeypatch, family, tree, count):
    monkeypatch.setattr(spied, "target", lambda: target(family))
    drafter, rule = ModelDrafter(learned(family), tree=tree), "rejection" if tree is None else "k_seq"
    spied.drawn_as_the_target(drafter, rule, count)


@OF_TWO
def test_what_it_drafts_becomes_text(family):
    """Else the tests above would show little."""
    options = GREEDY | {"eos_token_id": None, "return_dict_in_generate": True}
    out = written(family, ModelDrafter(learned(family)), **options)
    assert out.report.block_efficiency > 1.3


@OF_TWO
def test_nothing_of_the_target_is_changed(family):
    made = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    training, wanted = made.training, [p.requires_grad for p in made.parameters()]
    head = load_model("mtp").bind(made)
    assert head is OWN.bind(made)  # it is read once
    assert head.embed_tokens.weight.data_ptr() == made.get_input_embeddings().weight.data_ptr()
    assert made.training == training
    assert [p.requires_grad for p in made.parameters()] == wanted
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_it_goes_when_the_target_goes():
    made = AutoModelForCausalLM.from_pretrained(folder("glm4_moe"), dtype=torch.float32)
    seen = weakref.ref(OWN.bind(made)), weakref.ref(made)
    del made
    gc.collect()
    assert seen[0]() is None
    assert seen[1]() is None


def test_a_target_with_eager_attention_has_the_same_module():
    """Whose mask is added, where csdraft gives its heads masks of True and False."""
    family = "deepseek_v3"
    made = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32, attn_implementation="eager")
    head, mask = OWN.bind(made.eval()), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    given = torch.arange(3, 9)[None], torch.randn(1, 6, 32), torch.arange(6)[None]
    assert torch.allclose(head(*given, mask).logits, OWN.bind(target(family))(*given, mask).logits, atol=1e-5)
    assert made.config._attn_implementation == "eager"


@OF_TWO
@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_loading_is_strict(tmp_path, family, wrong):
    name, state = module_name(family, "eh_proj.weight"), tensors_of(folder(family))
    own = {key: value for key, value in state.items() if key.startswith((f"model.layers.{LAYERS}.", "mtp."))}
    changed = dict(own)
    other = module_name(family, "self_attn.other.weight")
    if wrong == "missing":
        del changed[name]
    elif wrong == "unknown":
        changed[other] = torch.ones(2)
    else:
        changed[name] = own[name][:, 1:].contiguous()
    write(tmp_path, {key: value for key, value in state.items() if key not in own}, changed)
    (tmp_path / "config.json").write_text((folder(family) / "config.json").read_text())
    made = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    says = {"missing": "lacks.*eh_proj", "unknown": "does not know.*other", "shape": "another shape.*eh_proj"}[wrong]
    with pytest.raises(ValueError, match=says):
        OWN.bind(made)


def test_one_file_is_read_too(tmp_path):
    family = "glm4_moe"
    save_file(tensors_of(folder(family)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder(family) / "config.json").read_text())
    head = OWN.bind(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    for mine, theirs in zip(head.parameters(), OWN.bind(target(family)).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_module_in_a_file_of_its_own_beside_the_one_file_of_the_rest(tmp_path):
    """The index names both; transformers alone reads `model.safetensors`."""
    family = "glm4_moe"
    state = tensors_of(folder(family))
    own = {key for key in state if key.startswith(f"model.layers.{LAYERS}.")}
    files = {"model.safetensors": state.keys() - own | {max(own)}, "mtp.safetensors": own - {max(own)}}
    for name, keys in files.items():
        save_file({key: state[key] for key in keys}, tmp_path / name, metadata={"format": "pt"})
    names = {key: name for name, keys in files.items() for key in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text((folder(family) / "config.json").read_text())
    head = OWN.bind(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    for mine, theirs in zip(head.parameters(), OWN.bind(target(family)).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_all_ways_to_name_it_are_one():
    for drafter in (ModelDrafter("mtp"), as_drafter("mtp"), _drafter("mtp", "float32", "cpu")):
        assert drafter.network is OWN
    assert as_drafter("mtp", target("glm4_moe")).network is OWN.bind(target("glm4_moe"))


def test_targets_without_a_module_are_told(tmp_path):
    with pytest.raises(ValueError, match="no num_mtp_layers"):
        OWN.bind(tiny("llama"))
    family = "glm4_moe"
    unread = AutoModelForCausalLM.from_config(copy.deepcopy(target(family).config))
    unread.config.name_or_path = ""
    with pytest.raises(ValueError, match="from_pretrained"):
        OWN.bind(unread)
    made = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2\.\*"):
        OWN.bind(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    with pytest.raises(ValueError, match="cannot run alone"):
        load_model("mtp")()
    with pytest.raises(ValueError, match="not trained"):
        next(iter(OWN.bind(target(family)).unrolled()))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_mtp_layers", 2, "num_mtp_layers=2 and mtp_layer_types"),
        ("mtp_layer_types", ["linear_attention"], "linear_attention.*of one kind"),
    ],
)
def test_modules_that_csdraft_cannot_draft_with_are_told(key, value, says):
    made = AutoModelForCausalLM.from_config(copy.deepcopy(target("mellum").config))
    setattr(made.config, key, value)
    with pytest.raises(ValueError, match=says):
        OWN.bind(made)


def test_a_cascade_with_it_is_saved_and_loaded(tmp_path):
    """Without its weights, which are the target's."""
    family = "deepseek_v3"
    for drafter in ("mtp", OWN.bind(target(family))):
        path = tmp_path / type(drafter).__name__
        CascadeDrafter([drafter, MaxGram()]).save_pretrained(path, target=target(family))
        assert not list(path.glob("models/**/*.safetensors"))
        again = CascadeDrafter.from_pretrained(path, target=target(family))
        assert torch.equal(written(family, again, **GREEDY), greedy(family))
        assert again.report.target.drafted.total() > 0
