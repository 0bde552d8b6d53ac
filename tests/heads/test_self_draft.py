"""Self-drafting for every family, on targets as users have them: other precisions, adapters, hooks and devices."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import csdraft
from csdraft.cascade import as_drafter
from csdraft.drafters.model import bound
from csdraft.models import base_model, load_model
from csdraft.trainers.students import make_student, save_student
from tests.tiny import drafter_of, fresh, inputs_of, noisy, on_target, prompt

FAMILIES, SLOW = ["llama", "gemma3", "gpt2", "falcon", "t5"], ("gpt2", "falcon")
MODULES = {
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "falcon": {"target_modules": ["query_key_value"]},
    "t5": {"target_modules": ["q", "v"]},
}
DEEPER = {
    "gpt2": {"n_layer": 3, "num_hidden_layers": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "gemma3": {},
}
STEPS = {"max_new_tokens": 10, "schedule": {"type": "fixed", "depth": 4}, "strict": True}
SAMPLING = {"do_sample": True, "row_seeds": [7]}


def target_of(family: str = "llama", seed: int = 0) -> nn.Module:
    """Three layers, so that there is something to leave out."""
    return fresh(family, seed, **DEEPER.get(family, {"num_hidden_layers": 3}))


def student_of(target: nn.Module, family: str = "llama", seed: int = 1) -> nn.Module:
    """An adapter on the first and last layer that changes what they say."""
    torch.manual_seed(seed)
    lora = {"target_modules": ["q_proj", "v_proj"]} | MODULES.get(family, {})
    return make_student(target, init=on_target([0, 2]), peft={"r": 2, "init_lora_weights": False, **lora}).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = prompt()["input_ids"]
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def drafted(drafter: object, target: nn.Module, inputs: dict | None = None, **options: object) -> tuple[list, list]:
    """The text, and whose choice each of its tokens was."""
    output = target.generate(
        **(inputs or prompt()), assistant=drafter, return_dict_in_generate=True, **(STEPS | options)
    )
    return output.sequences.tolist(), output.report.levels


def network_of(folder: str, target: nn.Module) -> nn.Module:
    return as_drafter(csdraft.ModelDrafter(folder), target).network


@pytest.fixture(scope="module")
def target() -> nn.Module:
    return target_of()


@pytest.fixture(scope="module")
def folders(target, tmp_path_factory) -> list[str]:
    """Two adapters of one base."""
    made = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for seed, folder in enumerate(made):
        save_student(student_of(target, seed=seed), folder)
    return [str(folder) for folder in made]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in FAMILIES]
)
def test_it_comes_back_and_drafts_as_its_merged_copy(family, tmp_path):
    """Logits, texts and parts in them: in memory, from disk and merged; greedy and sampling, one row and several."""
    target = target_of(family)
    student = student_of(target, family)
    save_student(student, tmp_path / "adapter")
    loaded = csdraft.ModelDrafter(tmp_path / "adapter")
    merged = copy.deepcopy(student).merge_and_unload()
    expected = logits(student)
    assert torch.equal(logits(bound(loaded, target).network), expected)
    rounding = 2e-4 if family == "t5" else 1e-5  # its unscaled attention blows it up
    torch.testing.assert_close(logits(merged), expected, atol=rounding, rtol=rounding)
    for rows, options in ((1, {}), (1, SAMPLING), (3, {})):
        inputs = inputs_of(family, rows)
        first, *others = (drafted(drafter, target, inputs, **options) for drafter in (student, loaded, merged))
        assert all(other == first for other in others)
        assert first[0] == drafted(csdraft.MaxGram(), target, inputs, **options)[0]


def test_its_precision_stays(target, tmp_path):
    """Trained in float32 on a bfloat16 base, as PEFT trains; cast, if somebody casts it."""
    low = copy.deepcopy(target).bfloat16()
    student = student_of(low)
    save_student(student, tmp_path / "adapter")
    network = network_of(str(tmp_path / "adapter"), low)
    assert {p.dtype for name, p in network.named_parameters() if "lora_" in name} == {torch.float32}
    assert torch.equal(logits(network), logits(student))
    cast = load_model(str(tmp_path / "adapter")).to(torch.bfloat16)
    assert {parameter.dtype for parameter in cast.bind(low).parameters()} == {torch.bfloat16}


def test_one_copy_of_the_adapter_too(target, folders):
    drafter = csdraft.ModelDrafter(folders[0])
    own = {p.data_ptr() for name, p in bound(drafter, target).network.named_parameters() if "lora_" in name}
    assert own == {tensor.data_ptr() for tensor in drafter.network.parameters()}


def test_a_target_with_an_adapter_of_its_own(target, folders):
    """The drafter stands on the base: drafts may be worse, the text is the target's."""
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(
        copy.deepcopy(target), peft.LoraConfig(**options, modules_to_save=["lm_head"])
    ).eval()
    plain, keys = adapted.generate(**prompt(), max_new_tokens=10), adapted.state_dict().keys()
    assert drafted(csdraft.ModelDrafter(folders[0]), adapted)[0] == plain.tolist()
    assert torch.equal(logits(network_of(folders[0], base_model(adapted))), logits(network_of(folders[0], target)))
    assert adapted.state_dict().keys() == keys
    assert adapted.active_adapters == ["default"]
    assert torch.equal(adapted.generate(**prompt(), max_new_tokens=10), plain)


def test_weights_that_change_where_they_lie_change_for_both(target, folders):
    mine = copy.deepcopy(target)
    network = network_of(folders[0], mine)
    before = logits(network)
    with torch.no_grad():
        mine.lm_head.weight.mul_(2)
    assert torch.equal(logits(network), 2 * before)


def test_what_hangs_on_the_target_stays_there(target, folders):
    """Hooks see the target's forwards only; somebody's own forward is not taken over, accelerate's devices are."""
    mine, seen = copy.deepcopy(target), []
    mine.register_forward_hook(lambda *_: seen.append("model"))
    mine.model.layers[0].register_forward_pre_hook(lambda *_: seen.append("layer"))
    mine.model.norm.forward = lambda hidden: seen.append("norm") or hidden
    mine(**prompt(), output_hidden_states=True)  # transformers hooks its layers then
    seen.clear()
    for layer in mine.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    drafter = csdraft.ModelDrafter(folders[0])
    network = bound(drafter, mine).network
    assert torch.equal(logits(network), logits(network_of(folders[0], target)))
    assert len(network(**prompt(), output_hidden_states=True).hidden_states) == 3
    assert not seen
    assert network.model.layers[0]._hf_hook is not mine.model.layers[0]._hf_hook
    logits(mine)
    assert sorted(seen) == ["layer", "model", "norm"]
    mine = weakref.ref(mine)
    gc.collect()
    assert mine() is None


def test_binding_under_inference_mode(target, folders):
    """The network may be used outside of it later."""
    drafter = csdraft.ModelDrafter(folders[0])
    with torch.inference_mode():
        text = drafted(drafter, target)
    assert drafted(drafter, target) == text
    assert not any(parameter.is_inference() for parameter in bound(drafter, target).network.parameters())


def test_in_a_nest_it_is_bound_once(target, folders):
    """A drafter that occurs twice stays one; what has no adapter is handed on as it is."""
    small = noisy(target, 0.3)
    cascade = csdraft.CascadeDrafter([*folders, small], [[3, 3, 2], [0, 2, 2], [0, 0, 2]], schedule="fixed")
    text, _ = drafted(cascade, target, schedule=None)
    assert text == target.generate(**prompt(), max_new_tokens=10).tolist()
    assert cascade.report.calls == 1
    assert set(cascade.report.models) == {"target", "first", "second", "LlamaForCausalLM"}
    now = as_drafter(cascade, target)
    assert [drafter.network for drafter in now.drafters] == now.models()
    assert now.drafters[2] is cascade.drafters[2]
    shares = [{p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name} for model in now.models()]
    assert shares[0] == shares[1] != shares[2]
    plain = csdraft.CascadeDrafter([drafter_of("llama"), csdraft.MaxGram()], [[3, 4], [0, 5]])
    assert as_drafter(plain, target) is plain


def test_the_default_schedule_writes_the_targets_text(target, folders):
    """It learns costs by model, and asks for their sessions."""
    cascade = csdraft.CascadeDrafter([folders[0], csdraft.MaxGram()], [4, 4])
    plain = target.generate(**prompt(), max_new_tokens=32).tolist()
    for assistant in (cascade, csdraft.ModelDrafter(folders[1]), folders[0]):
        assert target.generate(**prompt(), assistant=assistant, max_new_tokens=32, strict=True).tolist() == plain


def test_a_student_in_memory_is_saved_with_its_cascade(target, folders, tmp_path):
    """With its layers and base, as one that was loaded; no path of this machine goes with it."""
    options = {"k_matrix": [[3, 4], [0, 4]], "lenience": 2.0, "schedule": {"type": "fixed", "depth": 7}}
    in_memory = csdraft.CascadeDrafter([student_of(target, seed=0), csdraft.MaxGram()], **options)
    loaded = csdraft.CascadeDrafter([folders[0], csdraft.MaxGram()], **options)
    expected = drafted(loaded, target, schedule=None)
    assert drafted(in_memory, target, schedule=None) == expected
    documents = []
    for name, cascade in (("in_memory", in_memory), ("loaded", loaded)):
        cascade.save_pretrained(tmp_path / name)
        (saved,) = (tmp_path / name / "models").iterdir()
        assert {path.name for path in saved.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "drafter.json",
        }
        documents.append(json.loads((saved / "drafter.json").read_text()))
        assert drafted(str(tmp_path / name), target, schedule=None) == expected
        for path in (tmp_path / name).rglob("*.*"):
            assert path.is_dir() or str(Path(folders[0]).parents[2]).encode() not in path.read_bytes()
    assert documents[0] == documents[1]
    with pytest.raises(ValueError, match="whose weights have fingerprint"):
        csdraft.CascadeDrafter.from_pretrained(tmp_path / "loaded", target=target_of(seed=5))


def test_an_adapter_of_another_shape_is_refused(target, folders, tmp_path):
    """A folder put together by hand."""
    document = json.loads(Path(folders[0], "drafter.json").read_text()) | {"layers": [1]}
    adapter = csdraft.ModelDrafter(folders[0]).network
    adapter.save(tmp_path)
    (tmp_path / "drafter.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="has tensors for modules that its base lacks"):
        bound(csdraft.ModelDrafter(tmp_path), target)
