"""Self-drafting adapters draft on whatever target a call brings, change nothing of it, and are not confused."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import csdraft
from csdraft.drafters.model import ModelDrafter, bound
from csdraft.heads.self_draft import SelfDraft
from csdraft.models import base_model
from csdraft.reports.report import Report
from csdraft.trainers.students import make_student, save_student
from tests.tiny import fresh, on_target, prompt, ragged_batch

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
GREEDY = {"max_new_tokens": 12, "return_dict_in_generate": True}
SAMPLING = {"do_sample": True, "row_seeds": [3], "max_new_tokens": 12, "return_dict_in_generate": True}
ADAPTERS = {"first": [0, 1], "other": [0, 2]}


def base(seed: int = 0) -> nn.Module:
    """A model of three layers of which the first two often decide."""
    model = fresh("llama", seed, num_hidden_layers=3)
    model.config._name_or_path = "somebody/base"
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


def student_of(target: nn.Module, name: str) -> nn.Module:
    torch.manual_seed(len(ADAPTERS[name]) + sum(ADAPTERS[name]))
    return make_student(target, init=on_target(ADAPTERS[name]), peft=LORA).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two adapters of one base, on disk."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ADAPTERS:
        save_student(student_of(base(), name), root / name)
    return {name: str(root / name) for name in ADAPTERS}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**prompt()).logits


def on(target: nn.Module, folder: str) -> nn.Module:
    """The network that drafts for this target."""
    return bound(ModelDrafter(folder), target).network


def drafted(report: Report) -> tuple:
    """Who wrote which token, and how much a round: equal only for drafters that draft alike."""
    return report.tokens, report.levels, report.lengths, report.level_names


# The folder.


def test_the_folder_is_of_peft_and_says_what_it_stands_on(folders):
    files = {path.name for path in Path(folders["other"]).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "drafter.json"} <= files
    assert "model.safetensors" not in files
    document = json.loads(Path(folders["other"], "drafter.json").read_text())
    assert (document["kind"], document["layers"], document["encoder_layers"]) == ("self_draft", [0, 2], None)
    assert document["csdraft"] == csdraft.__version__
    assert document["base"]["name"] == "somebody/base"
    assert document["base"]["fingerprint"].startswith("sha256:")
    options = peft.PeftConfig.from_pretrained(folders["other"])
    assert (options.base_model_name_or_path, options.r) == ("somebody/base", 4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_equal_logits_after_save_and_reload(folders, name):
    target = base()
    network = on(target, folders[name])
    assert torch.equal(logits(network), logits(student_of(target, name)))
    assert not torch.allclose(logits(network), logits(target), atol=1e-2)


def test_an_adapter_for_t5(tmp_path):
    target = fresh("t5", num_layers=3, num_decoder_layers=3)
    options = {"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False}
    student = make_student(target, init=on_target([1, 2], encoder_layers=[1]), peft=options).eval()
    save_student(student, tmp_path)
    assert json.loads((tmp_path / "drafter.json").read_text())["encoder_layers"] == [1]
    inputs = prompt() | {"decoder_input_ids": prompt(6)["input_ids"]}
    with torch.no_grad():
        assert torch.equal(on(target, str(tmp_path))(**inputs).logits, student(**inputs).logits)
    output = target.generate(**prompt(), assistant=ModelDrafter(str(tmp_path), depth=3), max_new_tokens=8)
    assert torch.equal(output, target.generate(**prompt(), max_new_tokens=8))


# One set of weights, and a target that is left alone.


def test_a_bound_adapter_shares_the_targets_weights(folders):
    target = base()
    network = on(target, folders["other"])
    theirs = {parameter.data_ptr() for parameter in target.parameters()}
    own = [name for name, parameter in network.named_parameters() if parameter.data_ptr() not in theirs]
    assert own
    assert all("lora_" in name for name in own)
    wrapped = network.model.layers[1].self_attn.q_proj.base_layer.weight
    assert wrapped.data_ptr() == target.model.layers[2].self_attn.q_proj.weight.data_ptr()
    assert network.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr()


def test_the_target_is_left_as_it_was(folders):
    target = base()
    for parameter in target.model.layers[0].parameters():
        parameter.requires_grad_(False)
    names = {name: set(vars(module)) for name, module in target.named_modules()}
    flags = [parameter.requires_grad for parameter in target.parameters()]
    weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    config, before, state = target.config.to_dict(), logits(target), torch.get_rng_state()
    output = target.generate(**prompt(), assistant=ModelDrafter(folders["other"]), **GREEDY)
    assert torch.equal(output.sequences, target.generate(**prompt(), max_new_tokens=12))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: set(vars(module)) for name, module in target.named_modules()} == names
    assert [parameter.requires_grad for parameter in target.parameters()] == flags
    assert target.config.to_dict() == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in target.state_dict().items())
    assert torch.equal(logits(target), before)
    assert all(parameter.grad_fn is None for parameter in target.parameters())


def test_another_base_is_refused_with_both_fingerprints(folders):
    target, other = base(), base(seed=5)
    drafter = ModelDrafter(folders["first"])
    prints = []
    for model in (target, other):
        save_student(student_of(model, "first"), Path(folders["first"]).parent / "again")
        document = json.loads(Path(folders["first"]).parent.joinpath("again", "drafter.json").read_text())
        prints.append(document["base"]["fingerprint"])
    assert prints[0] != prints[1]
    with pytest.raises(ValueError, match=rf"layers \[0, 1\] of somebody/base.*{prints[0]}.*has {prints[1]}"):
        other.generate(**prompt(), assistant=drafter, max_new_tokens=4)
    target.generate(**prompt(), assistant=drafter, max_new_tokens=4)  # it still drafts for its own


def test_alone_it_says_what_it_needs(folders):
    drafter = ModelDrafter(folders["first"])
    assert isinstance(drafter.network, SelfDraft)
    with pytest.raises(ValueError, match="is an adapter for a target's own layers and cannot run alone"):
        drafter.network(**prompt())


# Decoding.


@pytest.mark.parametrize("options", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_it_decodes_as_its_merged_copy_does(folders, options):
    """The same text, and the same drafts on the way to it."""
    target = base()
    network = on(target, folders["other"])
    merged = copy.deepcopy(student_of(target, "other")).merge_and_unload().eval()
    torch.testing.assert_close(logits(network), logits(merged), atol=1e-5, rtol=0)
    fixed = {"schedule": "fixed"}
    outputs = [
        target.generate(**prompt(), assistant=ModelDrafter(model, name="d"), **options, **fixed)
        for model in (folders["other"], merged)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert drafted(outputs[0].report) == drafted(outputs[1].report)


def test_adapters_are_swapped_per_request(folders):
    """Each drafts in turn as it does alone, on one target, whichever has drafted before."""
    target = base()
    drafters = {name: ModelDrafter(folder, name=name) for name, folder in folders.items()}
    plain = target.generate(**ragged_batch(), max_new_tokens=10)

    def run(drafter: ModelDrafter) -> tuple:
        output = target.generate(
            **ragged_batch(), assistant=drafter, schedule="fixed", max_new_tokens=10, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, plain)
        return drafted(output.report)

    alone = {name: run(ModelDrafter(folder, name=name)) for name, folder in folders.items()}
    assert alone["first"] != alone["other"]
    for _ in range(3):
        for name, drafter in drafters.items():
            assert run(drafter) == alone[name]


def test_two_adapters_in_one_cascade(folders, tmp_path):
    """Also saved and loaded: the adapters go with it, the base does not."""
    target = base()
    cascade = csdraft.CascadeDrafter(
        [
            ModelDrafter(folders["other"], name="other"),
            ModelDrafter(folders["first"], name="first"),
            csdraft.MaxGram(),
        ],
        [[2, 2, 2], [0, 2, 2], [0, 0, 3]],
        schedule={"type": "fixed", "depth": 6},
    )
    inputs = ragged_batch()
    plain = target.generate(**inputs, max_new_tokens=10)
    first = target.generate(**inputs, assistant=cascade, max_new_tokens=10, return_dict_in_generate=True)
    assert torch.equal(first.sequences, plain)
    assert cascade.last_report is not None
    assert {"other", "first"} <= set(cascade.last_report.level_names)
    cascade.save_pretrained(tmp_path / "cascade", target=target)
    assert not list((tmp_path / "cascade").rglob("model.safetensors"))
    assert len(list((tmp_path / "cascade").rglob("drafter.json"))) == 2
    loaded = csdraft.CascadeDrafter.from_pretrained(tmp_path / "cascade", target=target)
    again = target.generate(**inputs, assistant=loaded, max_new_tokens=10, return_dict_in_generate=True)
    assert torch.equal(again.sequences, plain)
    assert drafted(again.report) == drafted(first.report)
    with pytest.raises(ValueError, match="whose weights have fingerprint"):
        csdraft.CascadeDrafter.from_pretrained(tmp_path / "cascade", target=base(seed=5))
    assert torch.equal(target.generate(**inputs, assistant=str(tmp_path / "cascade"), max_new_tokens=10), plain)


def test_the_path_of_an_adapter_is_drafter_enough(folders):
    target = base()
    plain = target.generate(**prompt(), max_new_tokens=8)
    assert torch.equal(target.generate(**prompt(), assistant=folders["first"], max_new_tokens=8), plain)
    cascade = csdraft.CascadeDrafter([folders["first"], csdraft.MaxGram()], [[3, 2], [0, 3]])
    assert torch.equal(target.generate(**prompt(), assistant=cascade, max_new_tokens=8), plain)


def test_a_student_in_training_drafts_itself(folders):
    """The trainer decodes with the very modules it trains."""
    target = base()
    student = student_of(target, "other")
    output = target.generate(**prompt(), assistant=ModelDrafter(student, name="d"), schedule="fixed", **GREEDY)
    stored = target.generate(
        **prompt(), assistant=ModelDrafter(folders["other"], name="d"), schedule="fixed", **GREEDY
    )
    assert drafted(output.report) == drafted(stored.report)


def test_an_ordinary_adapter_brings_its_base(tmp_path):
    target, small = base(), base(seed=7)
    small.save_pretrained(tmp_path / "small")
    student = make_student(target, student=str(tmp_path / "small"), peft=LORA).eval()
    save_student(student, tmp_path / "adapter")
    drafter = ModelDrafter(str(tmp_path / "adapter"))
    assert not isinstance(drafter.network, SelfDraft)
    assert torch.equal(logits(drafter.network), logits(student))
    (tmp_path / "adapter" / "drafter.json").unlink()  # as PEFT alone would have written it
    assert torch.equal(logits(ModelDrafter(str(tmp_path / "adapter")).network), logits(student))
    output = target.generate(**prompt(), assistant=drafter, max_new_tokens=8)
    assert torch.equal(output, target.generate(**prompt(), max_new_tokens=8))


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}])
def test_an_adapter_with_whole_modules_or_tokens(tmp_path, more):
    """What PEFT stores beside its matrices is read, too."""
    base().save_pretrained(tmp_path / "small")
    options = peft.LoraConfig(**LORA, **more)
    model = peft.get_peft_model(csdraft.models.load_model(str(tmp_path / "small")), options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(ModelDrafter(str(tmp_path / "adapter")).network), logits(model))


@pytest.mark.parametrize("init", [on_target([0, 2]), {"kangaroo": {"layers": 1}}, {"medusa": {}}])
def test_a_target_whose_adapter_trains_single_tokens(init, tmp_path):
    """PEFT wraps its embedding twice."""
    save_student(make_student(base(), init=init, peft=LORA if "from_target" in init else None), tmp_path)
    options = peft.LoraConfig(**LORA, trainable_token_indices=[3, 4])
    target = peft.get_peft_model(base(), options).eval()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "trainable_tokens" in name:
                parameter.mul_(1.5)
    plain = target.generate(**prompt(), **GREEDY | {"return_dict_in_generate": False})
    assert torch.equal(target.generate(**prompt(), **GREEDY, assistant=tmp_path, strict=True).sequences, plain)


# Memory.


@pytest.mark.slow
def test_calls_leave_nothing_behind(folders):
    """120 calls, alternating between the adapters."""
    target = base()
    drafters = [ModelDrafter(folder) for folder in folders.values()]

    def things_after(count: int) -> int:
        for i in range(count):
            target.generate(**prompt(4), assistant=drafters[i % 2], max_new_tokens=2)
        gc.collect()
        return len(gc.get_objects())  # tensors and modules among them

    before = things_after(20)
    assert things_after(120) - before < 100  # less than any that a call would make, 120 times


def test_neither_keeps_the_other_alive(folders):
    target, drafter = base(), ModelDrafter(folders["first"])
    target.generate(**prompt(), assistant=drafter, max_new_tokens=2)
    network = weakref.ref(bound(drafter, target).network)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None
    assert network() is None
    target = base()
    target.generate(**prompt(), assistant=drafter, max_new_tokens=2)
    adapter, network = weakref.ref(drafter.network), weakref.ref(bound(drafter, target).network)
    del drafter
    gc.collect()
    assert adapter() is None
    assert network() is None
    target.generate(**prompt(), max_new_tokens=2)


def test_a_target_that_moves_is_bound_anew(folders):
    """A cast, or a move, gives the target other tensors: shared ones would be those of before."""
    target, drafter = base(), ModelDrafter(folders["first"])
    first = bound(drafter, target).network
    assert bound(drafter, target).network is first
    target.bfloat16()
    second = bound(drafter, target).network
    assert second is not first
    assert second.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr()


def test_the_fingerprint_is_of_the_base_inside_a_wrapper(folders):
    """A target that wears a PEFT adapter of its own is still that base."""
    target = base()
    wrapped = peft.get_peft_model(target, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    network = on(base_model(wrapped), folders["first"])
    assert torch.equal(logits(network), logits(student_of(base(), "first")))


def test_documents_that_cannot_be_read_are_refused(folders, tmp_path):
    shutil.copytree(folders["first"], tmp_path / "new")
    document = json.loads((tmp_path / "new" / "drafter.json").read_text())
    (tmp_path / "new" / "drafter.json").write_text(json.dumps(document | {"format": 9}))
    with pytest.raises(ValueError, match=r"has format 9 and kind 'self_draft'.*pip install -U csdraft"):
        ModelDrafter(str(tmp_path / "new"))
