"""Students start as what they are cut from, leave the target as it was, and come back from disk unchanged."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from torch import nn

from csdraft.heads.layers import fingerprint, layer_stacks
from csdraft.models import base_model, load_model
from csdraft.trainers import engines
from csdraft.trainers.students import (
    added_share,
    check_engine,
    check_student,
    load_student_weights,
    make_student,
    save_student,
)
from tests.tiny import EOS, PAD, VOCAB, fresh, on_target, prompt, tiny, tokenizer

CUTTABLE = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "falcon", "t5", "flan"]
DEEPER = {
    "gpt2": {"n_layer": 3, "num_hidden_layers": 3},
    "gemma2": {},
    "gemma3": {},
    "t5": {"num_layers": 3, "num_decoder_layers": 4},
    "flan": {"num_layers": 3, "num_decoder_layers": 4},
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def deep(family: str, **changes: object) -> nn.Module:
    """Three layers, and a fourth in T5's decoder."""
    return fresh(family, **(DEEPER.get(family, {"num_hidden_layers": 3}) | changes))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = prompt()["input_ids"]
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def cut(target: nn.Module, layers: list[int], **more: object) -> nn.Module:
    return make_student(target, init={"from_target": {"layers": layers, **more}})


def without(target: nn.Module, keep: list[int], keep_encoder: list[int] | None = None) -> nn.Module:
    """The target whose other layers hand on what they are given: what a cut student should compute."""
    model = copy.deepcopy(target)
    for stack, kept in zip(layer_stacks(model), (keep, keep_encoder), strict=False):
        for number, layer in enumerate(stack):
            if kept is not None and number not in kept:
                silence(layer)
    return model


def silence(layer: nn.Module) -> None:
    """Every branch of a residual layer ends in one of these; norms after a branch may add a bias of their own."""
    ends = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "o", "wo")
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        if last in ends or (last in after and "Gemma" in type(module).__name__):
            for parameter in module.parameters():
                parameter.data.zero_()
            if "Gemma" in type(module).__name__:
                module.weight.data.fill_(-1)  # its norms multiply by 1 + weight


# Cut out of the target.


@pytest.mark.parametrize("family", CUTTABLE)
def test_with_all_layers_a_cut_student_is_the_target(family, tmp_path):
    """Also as stock transformers reads it from disk."""
    target = deep(family)
    depth = len(layer_stacks(target)[0])
    student = cut(target, list(range(depth)))
    assert torch.equal(logits(student), logits(target))
    save_student(student, tmp_path, tokenizer())
    auto = (
        transformers.AutoModelForSeq2SeqLM if target.config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(target))
    assert json.loads((tmp_path / "drafter.json").read_text())["kind"] == "full"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_cut_student_computes_what_its_layers_do(family):
    """Checked against the target with its other layers silenced, not against the code that cuts."""
    target = deep(family)
    layers = [0, len(layer_stacks(target)[0]) - 1]
    encoder = {"encoder_layers": [0, 2]} if target.config.is_encoder_decoder else {}
    student = cut(target, layers, **encoder)
    assert [len(stack) for stack in layer_stacks(student)] == [2] * len(layer_stacks(student))
    expected = logits(without(target, layers, encoder.get("encoder_layers")))
    torch.testing.assert_close(logits(student), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(student), logits(target), atol=1e-2)


def test_lists_with_an_entry_a_layer_are_cut_too():
    student = cut(deep("gemma3"), [0, 2])
    assert student.config.layer_types == ["sliding_attention", "sliding_attention"]
    assert student.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    decoded = student.generate(**prompt(30), max_new_tokens=8)
    assert torch.equal(decoded, student.generate(**prompt(30), max_new_tokens=8, use_cache=False))


def test_t5_keeps_its_positions_without_its_first_layer():
    """The table that all layers use stands in the first one."""
    target = deep("t5")
    student = cut(target, [1, 3], encoder_layers=[2])
    for stack, source in zip(layer_stacks(student), layer_stacks(target), strict=True):
        table = stack[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(table, source[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert (student.config.num_decoder_layers, student.config.num_layers) == (2, 1)
    assert len(layer_stacks(cut(target, [0]))[1]) == 3  # the encoder stays whole


def test_a_cut_student_is_a_model_of_its_own():
    """float32, whatever the target is; no tensor is shared; neither config nor flags of the target change."""
    target = deep("llama").bfloat16()
    before = target.config.to_dict()
    student = cut(target, [0, 2])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in [*student.parameters(), *target.parameters()])
    assert target.config.to_dict() == before
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, target.model.layers[2].mlp.up_proj.weight.float())
    expected = sum(parameter.numel() for parameter in student.parameters())
    assert added_share(student, target) == expected / sum(parameter.numel() for parameter in target.parameters())


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("llama", {"layers": [0, 3]}, r"layers=\[0, 3\]: list numbers of the target's 3 layers"),
        ("llama", {"layers": [1, 0]}, "in rising order"),
        ("llama", {"layers": []}, "in rising order"),
        ("llama", {"layers": "all"}, "layers='all'"),
        ("llama", {}, "layers=None"),
        ("llama", {"layers": [0], "layer": 1}, "no option 'layer': did you mean 'layers'"),
        ("llama", {"layers": [0], "encoder_layers": [0]}, "has no encoder"),
        ("t5", {"layers": [0], "encoder_layers": [3]}, "encoder_layers=.*target's 3 layers"),
        ("bart", {"layers": [0]}, "'bart' model: of encoder-decoders only"),
    ],
)
def test_cuts_that_are_refused(family, given, message):
    """By the config alone, before any weights are there."""
    target = fresh("bart") if family == "bart" else deep(family)
    with pytest.raises(ValueError, match=message):
        check_student(target.config, init={"from_target": given})


def test_a_family_whose_config_does_not_say_it_all_is_refused():
    """Here an attention scale by layer number: a student of layers 1 and 2 would count them from 0."""
    target = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel \(gpt2\) cannot be cut: the config does not keep \['scaling'\]"
    ):
        cut(target, [1, 2])
    assert torch.equal(logits(cut(target, [0, 1])), logits(cut(target, [0, 1])))


def test_weights_that_are_not_there_are_refused():
    config = tiny("llama").config
    with torch.device("meta"):
        target = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="not there as a whole"):
        cut(target, [0])


# From scratch.


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_new_model_has_the_targets_vocabulary(family):
    sizes = (
        {"num_layers": 1, "d_model": 16, "d_ff": 8} if family == "t5" else {"hidden_size": 16, "intermediate_size": 8}
    )
    heads = {"num_heads": 2, "d_kv": 4} if family == "t5" else {"num_attention_heads": 2, "num_hidden_layers": 1}
    student = make_student(tiny(family), init={"config": sizes | heads})
    assert type(student) is type(tiny(family))
    config, wanted = student.config, tiny(family).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (VOCAB, PAD, EOS)
    assert student.generation_config.eos_token_id == tiny(family).generation_config.eos_token_id
    if family == "t5":
        assert config.decoder_start_token_id == wanted.decoder_start_token_id
    else:
        assert config.max_position_embeddings == wanted.max_position_embeddings
    tiny(family).generate(**prompt(), assistant=student, max_new_tokens=4)


def test_a_new_model_of_another_type():
    options = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "num_attention_heads": 2}  # either of a key's names
    student = make_student(tiny("llama"), init={"config": options})
    assert isinstance(student, transformers.GPT2LMHeadModel)
    assert (student.config.vocab_size, student.config.n_head) == (VOCAB, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 16}, r"init.config \(llama\) has no option 'hiden_size': did you mean 'hidden_size'"),
        ({"vocab_size": 16}, "has no option 'vocab_size'"),
        ({"hidden_size": "wide"}, "init.config: .*hidden_size"),
        ({"model_type": "lama"}, "model_type 'lama' is unknown to transformers: did you mean 'llama'"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder, the target 'llama' is not"),
    ],
)
def test_configs_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_student(tiny("llama").config, init={"config": options})


# Which student.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no student given; choose one"),
        ({"student": "x", "init": {"config": {}}}, "student and init given; choose one"),
        ({"student": "x", "init": on_target([0]), "peft": {"r": 2}}, "student and init given; choose one"),
        ({"student": "x", "peft": {"layers": [0]}}, r"init: {from_target: {layers: \[0\], shared: true}}"),
        (
            {"peft": {"layers": [0, 1], "encoder_layers": [1], "r": 2}},
            r"self-drafting give init: {from_target: {layers: \[0, 1\], encoder_layers: \[1\], shared: true}}",
        ),
        ({"init": {"from_target": {"layers": [0]}}, "peft": {"shared": True}}, "not options of LoRA.*shared: true"),
        ({"init": {"from_target": {"layers": [0]}}, "peft": {"r": 2}}, "peft with init.*shared: true"),
        ({"init": on_target([0])}, "shared: true needs peft"),
        ({"init": on_target([0], shared="yes")}, "shared='yes' must be true or false"),
        ({"init": on_target([0], tie_to_target=True), "peft": {"r": 2}}, "shared: true with tie_to_target"),
        ({"peft": {"r": 2}}, "no student given"),
        ({"init": {"config": {}}, "peft": {"r": 2}}, "peft with init"),
        ({"init": {"scratch": {}}}, "init has no option 'scratch'"),
        ({"init": {"config": 3}}, "init={'config': 3}: give"),
        ({"student": "x", "peft": {"rank": 2}}, r"peft \(LoRA\) has no option 'rank'"),
        ({"student": "x", "peft": {"lora_alfa": 2}}, "did you mean 'lora_alpha'"),
        ({"init": on_target([9]), "peft": {"r": 2}}, r"layers=\[9\]: list numbers of the target's 2 layers"),
        ({"init": on_target([0]), "peft": {"bias": "all"}}, "would change the target's own"),
        ({"init": on_target([0]), "peft": {"init_lora_weights": "pissa"}}, "may depend on the base or change it"),
        ({"student": "x", "peft": {"init_lora_weights": "olora"}}, "may depend on the base or change it"),
        ({"student": "x", "peft": {"alora_invocation_tokens": [1]}}, "has no option 'alora_invocation_tokens'"),
    ],
)
def test_students_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_student(tiny("llama").config, **given)


def test_sharding_engines_take_no_shared_weights(monkeypatch):
    for engine, variable in engines.ENGINES.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            with pytest.raises(ValueError, match=f"cannot be trained under {engine}: its layers are the target's own"):
                check_student(tiny("llama").config, init=on_target([0]), peft={"r": 2})
            check_student(tiny("llama").config, student="x", peft={"r": 2})
    for options, engine in (({"deepspeed": "zero2.json"}, "DeepSpeed"), ({"fsdp": True}, "FSDP")):
        with pytest.raises(ValueError, match=f"cannot be trained under {engine}"):
            check_engine(True, **options)
        check_engine(False, **options)
    check_engine(True)


def test_a_stored_model_is_trained_in_float32(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    load_model(str(tmp_path), dtype=torch.bfloat16).save_pretrained(tmp_path)
    student = make_student(tiny("llama"), student=str(tmp_path))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert make_student(str(tmp_path), student=student) is student


# Adapters on a small model.


def test_lora_on_a_small_model(tmp_path):
    """Only the adapter learns; what is saved is a PEFT folder, which can be trained on."""
    tiny("llama").save_pretrained(tmp_path / "small")
    student = make_student(tiny("llama"), student=str(tmp_path / "small"), peft=LORA)
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    save_student(student, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "drafter.json").read_text())["kind"] == "full"
    assert torch.equal(logits(load_model(str(tmp_path / "adapter"))), logits(student.eval()))
    again = make_student(tiny("llama"), student=str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(student))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == learning
    with pytest.raises(ValueError, match="is an adapter already"):
        make_student(tiny("llama"), student=str(tmp_path / "adapter"), peft=LORA)


# Adapters on the target's own layers.


def self_drafting(target: nn.Module, layers: list[int], **more: object) -> nn.Module:
    return make_student(target, init=on_target(layers), peft=LORA | more)


def test_self_drafting_shares_the_targets_weights():
    target = deep("llama")
    for parameter in target.model.layers[0].parameters():
        parameter.requires_grad_(False)
    flags, config, keys = [p.requires_grad for p in target.parameters()], target.config.to_dict(), set(vars(target))
    student = self_drafting(target, [0, 2])
    theirs = {parameter.data_ptr() for parameter in target.parameters()}
    for name, parameter in student.named_parameters():
        assert (parameter.data_ptr() in theirs) is ("lora_" not in name)
        assert parameter.requires_grad is ("lora_" in name)
    assert [p.requires_grad for p in target.parameters()] == flags
    assert target.config.to_dict() == config
    assert set(vars(target)) == keys
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in target.modules())
    layers = base_model(student).model.layers
    assert layers[1].mlp.up_proj.weight.data_ptr() == target.model.layers[2].mlp.up_proj.weight.data_ptr()
    plain = self_drafting(target, [0, 2], init_lora_weights=True)
    assert torch.equal(logits(plain.eval()), logits(cut(target, [0, 2])))


def test_a_step_changes_the_adapter_and_nothing_else():
    target = deep("llama")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    student = self_drafting(target, [0, 1], init_lora_weights=True)
    first = {name: parameter.clone() for name, parameter in student.named_parameters()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    student.train()(**prompt(), labels=prompt()["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, first[name])}
    assert changed
    assert all("lora_B" in name for name in changed)


def test_a_small_adapter_adds_little():
    target = fresh("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    student = self_drafting(target, [0, 1], r=2)
    added = sum(parameter.numel() for name, parameter in student.named_parameters() if "lora_" in name)
    share = added_share(student, target)
    assert share == added / sum(parameter.numel() for parameter in target.parameters())
    assert 0 < share < 0.02


# Checkpoints.


@pytest.mark.parametrize("kind", ["cut", "tied", "self_drafting", "lora", "lora_embedding"])
def test_weights_come_back(kind, tmp_path):
    """Into a student made in the same way, as a resumed run makes it."""
    target = deep("llama", tie_word_embeddings=kind == "tied")
    target.save_pretrained(tmp_path / "target")

    def make() -> nn.Module:
        if kind.startswith("lora"):
            peft = LORA if kind == "lora" else LORA | {"target_modules": ["q_proj", "embed_tokens"]}
            return make_student(target, student=str(tmp_path / "target"), peft=peft)
        return self_drafting(target, [0, 2]) if kind == "self_drafting" else cut(target, [0, 2])

    trained = make()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_student(trained, tmp_path / "checkpoint")
    resumed = make()
    flags = [parameter.requires_grad for parameter in resumed.parameters()]
    load_student_weights(resumed, tmp_path / "checkpoint")
    assert torch.equal(logits(resumed.eval()), logits(trained.eval()))
    assert [parameter.requires_grad for parameter in resumed.parameters()] == flags


def test_sharded_checkpoints_and_gathered_weights(tmp_path):
    target = deep("llama")
    student = cut(target, [0, 2])
    student.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    other = cut(deep("llama", seed=5), [0, 2])
    load_student_weights(other, tmp_path / "parts")
    assert torch.equal(logits(other), logits(student))
    gathered = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    save_student(student, tmp_path / "gathered", state_dict=gathered)
    load_student_weights(other, tmp_path / "gathered")
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in other.state_dict().items())


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    target = deep("llama")
    save_student(cut(target, [0, 2]), tmp_path / "two")
    save_student(self_drafting(target, [0, 2]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds another student: .* such as model.layers.1.*None here"):
        load_student_weights(cut(target, [0]), tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds another student: .*of shape \(2, 32\) there and \(4, 32\) here"):
        load_student_weights(self_drafting(target, [0, 2], r=4), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter for layers \[0, 2\] of the base sha256:.*has layers \[0, 1\]"):
        load_student_weights(self_drafting(target, [0, 1]), tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter for layers"):
        load_student_weights(self_drafting(deep("llama", seed=5), [0, 2]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has none of model.safetensors"):
        load_student_weights(cut(target, [0]), tmp_path / "adapter")


def test_a_stored_adapter_is_trained_on(tmp_path):
    target = deep("llama")
    student = self_drafting(target, [0, 2])
    save_student(student, tmp_path)
    again = make_student(target, student=str(tmp_path))
    assert torch.equal(logits(again.eval()), logits(student.eval()))
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in again.named_parameters()} == flags
    save_student(again, tmp_path / "again")
    assert (tmp_path / "again" / "drafter.json").read_text() == (tmp_path / "drafter.json").read_text()
    with pytest.raises(ValueError, match="whose weights have fingerprint"):
        make_student(deep("llama", seed=5), student=str(tmp_path))


# Fingerprints.


def test_a_fingerprint_is_of_the_weights():
    """Not of the dtype they are loaded in, nor of names, flags, the vocabulary's padding or adapters."""
    target = deep("llama").bfloat16()
    print_of = fingerprint(target)
    assert fingerprint(copy.deepcopy(target).float()) == fingerprint(copy.deepcopy(target).half()) == print_of
    other = copy.deepcopy(target).requires_grad_(False)
    other.config._name_or_path = "elsewhere"
    other.resize_token_embeddings(VOCAB + 7)
    assert fingerprint(other) == print_of
    adapted = peft.get_peft_model(copy.deepcopy(target), peft.LoraConfig(**LORA))
    assert fingerprint(base_model(adapted)) == print_of
    assert fingerprint(adapted.merge_and_unload()) != print_of
    assert fingerprint(deep("llama", seed=5).bfloat16()) != print_of
    with torch.no_grad():
        target.model.layers[1].self_attn.v_proj.weight += 0.1
    assert fingerprint(target) != print_of


@pytest.mark.parametrize("changed", [{"partial_rotary_factor": 0.5}, {"rope_type": "dynamic", "factor": 2.0}])
def test_a_head_that_could_not_be_read_again_is_not_made(changed):
    rotary = {"rope_type": "default", "rope_theta": 1e4, **changed}
    with pytest.raises(ValueError, match=rf"init\.eagle\.config: {next(iter(changed))}="):
        make_student(tiny("llama"), init={"eagle": {"config": {"rope_parameters": rotary}}})


def test_layers_of_several_sizes(tmp_path):
    """As in Gemma 4, whose config has no head_dim of the whole model: it is loaded, and a head is made for it."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = transformers.Gemma4TextConfig(**sizes, num_key_value_heads=2, hidden_size_per_layer_input=0)
    transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path)
    target = load_model(tmp_path)
    head = make_student(target, init={"eagle3": {"layers": [0, 1, 2]}})
    wanted = {**prompt(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(target.generate(**wanted, assistant=head, strict=True), target.generate(**wanted))
    for init in (on_target([0]), {"from_target": {"layers": [0]}}, {"kangaroo": {"layers": 1}}):
        with pytest.raises(ValueError, match="layers cannot be taken out of a 'gemma4_text' model"):
            check_student(config, init=init)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "deepseek_v4"])
def test_a_target_with_several_hidden_states_for_each_token_has_no_head(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(ValueError, match=rf"init\.eagle: a '{model_type}' target has 4 hidden states for each token"):
        check_student(config, init={"eagle": {}})
