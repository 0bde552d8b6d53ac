"""Students that use the target's embedding and output layer: frozen, not saved, and the target's when they draft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import csdraft
from csdraft.cascade import as_drafter
from csdraft.decoding.names import name_of
from csdraft.heads.layers import embeddings
from csdraft.models import load_model
from csdraft.trainers.run import distill
from csdraft.trainers.students import added_share, check_student, load_student_weights, make_student, save_student
from tests.tiny import fresh, inputs_of, noisy, prompt, tokenizer
from tests.trainers.pair import arguments, make_pair

FAMILIES = ["llama", "gemma3", "gpt2", "opt", "falcon", "t5"]
DEEPER = {
    "gpt2": {"n_layer": 3, "num_hidden_layers": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "gemma3": {},
}
STEPS = {"max_new_tokens": 10, "schedule": {"type": "fixed", "depth": 4}, "strict": True}


def target_of(family: str, seed: int = 0, **changes: object) -> nn.Module:
    return fresh(family, seed, **DEEPER.get(family, {"num_hidden_layers": 3}) | changes)


def tied_to(target: nn.Module) -> nn.Module:
    """Two of the target's layers, as some training has left them."""
    student = make_student(target, init={"from_target": {"layers": [0, 2], "tie_to_target": True}})
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return student.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = prompt()["input_ids"]
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def bound_to(target: nn.Module, folder: Path) -> nn.Module:
    return as_drafter(csdraft.ModelDrafter(folder), target).network


FAST = [(family, family != "opt") for family in FAMILIES] + [("llama", False)]
"""Each family with its layers tied or not, llama both ways."""
TIED = [
    pytest.param(family, tied, marks=[] if (family, tied) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for tied in (False, True)
]


@pytest.mark.parametrize(("family", "tied"), TIED)
def test_it_comes_back_over_the_targets_tensors_and_drafts_alike(family, tied, tmp_path):
    """In memory, from its folder, and from the folder of a cascade; the target may tie its own two or not."""
    target = target_of(family, tie_word_embeddings=tied)
    student = tied_to(target)
    save_student(student, tmp_path / "tied", tokenizer())
    network = bound_to(target, tmp_path / "tied")
    assert torch.equal(logits(network), logits(student))
    theirs = {parameter.data_ptr() for parameter in embeddings(target).values()}
    assert {parameter.data_ptr() for parameter in embeddings(network).values()} == theirs
    assert embeddings(network).keys() == embeddings(target).keys()  # weights that are tied stay one parameter
    own = sum(tensor.numel() for tensor in stored(tmp_path / "tied").values())
    assert own == sum(parameter.numel() for parameter in network.parameters() if parameter.data_ptr() not in theirs)
    for share in (added_share(student, target), added_share(network, target)):
        assert share == own / target.num_parameters()

    csdraft.CascadeDrafter([str(tmp_path / "tied"), csdraft.MaxGram()]).save_pretrained(tmp_path / "cascade")
    cascade = csdraft.CascadeDrafter.from_pretrained(tmp_path / "cascade", target=target)
    plain = target.generate(**inputs_of(family, 3), max_new_tokens=10)
    for drafter in (student, str(tmp_path / "tied"), cascade):
        assert torch.equal(target.generate(**inputs_of(family, 3), assistant=drafter, **STEPS), plain)


def test_its_layers_take_the_targets_precision(tmp_path):
    target = target_of("llama")
    save_student(tied_to(target), tmp_path / "tied")
    low = copy.deepcopy(target).bfloat16()
    network = bound_to(low, tmp_path / "tied")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert logits(network).dtype == torch.bfloat16


def test_a_target_with_an_adapter_and_more_rows_lends_its_own(tmp_path):
    target = target_of("llama")
    save_student(tied_to(target), tmp_path / "tied")
    expected = logits(bound_to(target, tmp_path / "tied"))
    options = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
    adapted = peft.get_peft_model(
        copy.deepcopy(target), peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **options)
    ).eval()
    assert torch.equal(logits(bound_to(adapted.get_base_model(), tmp_path / "tied")), expected)
    wider = copy.deepcopy(target)
    wider.resize_token_embeddings(target.config.vocab_size + 7)
    assert torch.equal(logits(bound_to(wider, tmp_path / "tied"))[..., : expected.shape[-1]], expected)


def test_reports_call_it_by_its_folder(tmp_path):
    target = target_of("llama")
    save_student(tied_to(target), tmp_path / "mine")
    assert name_of(bound_to(target, tmp_path / "mine")) == "mine"


def test_another_target_is_refused(tmp_path):
    target = target_of("llama")
    save_student(tied_to(target), tmp_path / "tied")
    for other in (target_of("llama", seed=1), noisy(target), target_of("qwen3")):
        with pytest.raises(ValueError, match=r"embedding and output layer of LlamaForCausalLM, whose .* sha256"):
            other.generate(**prompt(), assistant=str(tmp_path / "tied"), max_new_tokens=4)
        with pytest.raises(ValueError, match="Decode with that target, or train one for this target"):
            make_student(other, str(tmp_path / "tied"))
    with pytest.raises(ValueError, match="cannot run alone; pass it to generate"):
        load_model(str(tmp_path / "tied"))(**prompt())


@pytest.mark.parametrize("key", ["base", "borrowed"])
def test_a_drafter_json_without_one_of_its_parts_is_refused(tmp_path, key):
    save_student(tied_to(target_of("llama")), tmp_path)
    file = tmp_path / "drafter.json"
    document = json.loads(file.read_text())
    for wrong in ({}, {key: "x"}, {key: {"name": 1}}):
        file.write_text(json.dumps({name: value for name, value in document.items() if name != key} | wrong))
        with pytest.raises(ValueError, match=rf"drafter\.json: {key}"):
            load_model(str(tmp_path))


def test_mistakes_in_its_options():
    config = target_of("qwen3").config
    for cut, words in (({"layers": [0], "tie_to_target": "yes"}, "tie_to_target='yes' must be true or false"),):
        with pytest.raises(ValueError, match=words):
            check_student(config, init={"from_target": cut})


@pytest.mark.slow
def test_training_leaves_the_targets_part_alone_and_resumes(tmp_path):
    """From layers of the target to a folder without its embedding; from there, and from a checkpoint, further."""
    folder = make_pair(tmp_path)
    init = {"from_target": {"layers": [0, 2], "tie_to_target": True}}
    trainer = distill(arguments(folder, "tied", student=None, init=init))
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    trained = {name for name, parameter in trainer.student.named_parameters() if parameter.requires_grad}
    assert embeddings(trainer.student)["input.weight"].equal(embeddings(target)["input.weight"])
    assert stored(folder / "tied").keys() == trained
    assert json.loads((folder / "tied/drafter.json").read_text())["kind"] == "tied"
    assert not any("embed_tokens" in name for name in stored(folder / "tied/checkpoint-2"))
    card = (folder / "tied/README.md").read_text()
    assert "embedding and output layer are the target's" in card
    own = sum(tensor.numel() for tensor in stored(folder / "tied").values())
    assert f"adds {100 * own / target.num_parameters():.2f} % of" in card

    longer = distill(arguments(folder, "tied", student=None, init=init, max_steps=6))
    whole = distill(arguments(folder, "whole", student=None, init=init, max_steps=6))
    assert all(tensor.equal(stored(folder / "whole")[name]) for name, tensor in stored(folder / "tied").items())
    assert longer.state.log_history[3]["loss"] == whole.state.log_history[3]["loss"]

    again = distill(arguments(folder, "again", student=str(folder / "tied"), max_steps=1))
    assert again.args.learning_rate == 0.01
    assert stored(folder / "again").keys() == trained
    load_student_weights(again.student, folder / "tied")
    assert torch.equal(logits(again.student.eval()), logits(bound_to(target, folder / "tied")))
