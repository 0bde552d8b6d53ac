"""Kangaroo: what its network computes, that it shares the target's layers, and that its drafts show in no text."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainers.pair import arguments, make_pair
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.drafters.vertical import Vertical
from csdraft.export import export_drafter
from csdraft.heads.layers import layer_stacks
from csdraft.models import load_model
from csdraft.schedules.confidence import Confidence
from csdraft.trainers.objective import Distillation
from csdraft.trainers.run import distill
from csdraft.trainers.students import (
    added_share,
    check_student,
    kind_asked,
    load_student_weights,
    make_student,
    save_student,
)
from csdraft.trees.best_first import BestFirst
from csdraft.trees.sampled import Sampled
from tests.heads.kinds import OBJECTIVE, batch
from tests.heads.learned import PROMPTS, target
from tests.heads.spied import (
    DRAWS,
    EVERY,
    FIXED,
    FORMS,
    GREEDY,
    LONG,
    SAMPLED,
    Spied,
    drawn_as_the_target,
    each_way,
    written,
)
from tests.tiny import fresh, prompt, ragged_batch

DEEPER = {"gpt2": {"n_layer": 3, "num_hidden_layers": 3}, "gemma2": {}, "gemma3": {}}
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "falcon"]
ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}


def new(layers: int = 1, of: Any = None) -> Any:
    """An adapter that is not what it starts as."""
    made = make_student(of or target(), init={"kangaroo": {"layers": layers}})
    torch.manual_seed(layers)
    with torch.no_grad():
        for parameter in trained(made).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def trained(network: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@cache
def learned(layers: int = 1) -> Any:
    """One that drafts what the target writes here, often; tests must not change it."""
    made = new(layers)
    step = Distillation(made, target(), OBJECTIVE).train()
    optimizer = torch.optim.AdamW(trained(made).values(), 0.015)
    for _ in range(60):
        optimizer.zero_grad()
        step(**batch(every=5)).backward()
        optimizer.step()
    return made.eval().requires_grad_(False)


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network(**prompt()).logits


class Watched(Spied):
    """It is an ordinary small model, whose forward needs no features."""

    @torch.no_grad()
    def right(self, text: list[int], path: list[int]) -> Tensor:
        return self.network(torch.tensor([[*text, *path]]), use_cache=False).logits[0, -1].softmax(-1)


def early(model: Any, layers: int) -> Any:
    """A copy of the target, of which a block adds no MLP and those after it hand on what they are given."""
    made = copy.deepcopy(model)
    stack = layer_stacks(made)[0]
    stack[layers].mlp.register_forward_hook(lambda _, given, out: torch.zeros_like(out))
    for block in stack[layers + 1 :]:
        block.register_forward_hook(
            lambda _, given, out: given[0] if isinstance(out, Tensor) else (given[0], *out[1:])
        )
    return made


# What it computes.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_it_begins_as_an_early_exit_without_the_last_mlp(family, layers):
    model = fresh(family, **DEEPER.get(family, {"num_hidden_layers": 3}))
    made = make_student(model, init={"kangaroo": {"layers": layers}})
    torch.testing.assert_close(logits(made), logits(early(model, layers)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(made), logits(model), atol=1e-2)
    plain = model.generate(**prompt(), max_new_tokens=12)
    assert torch.equal(model.generate(**prompt(), assistant=ModelDrafter(made), strict=True, max_new_tokens=12), plain)


@torch.no_grad()
def test_its_adapter_is_attention_between_two_norms():
    """Written down once more, from the target's hidden state after block k."""
    made, ids = new(2), prompt()["input_ids"]
    own, width = trained(made), ids.shape[1]
    hidden = target()(ids, output_hidden_states=True).hidden_states[2]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + target().config.rms_norm_eps) * weight

    assert own.keys() == {f"model.layers.2.{name}" for name in ATTENTION | {"input_layernorm.weight"}} | {
        "model.norm.weight"
    }
    read = normed(hidden, own["model.layers.2.input_layernorm.weight"])
    q, k, v = (
        (read @ own[f"model.layers.2.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8)).transpose(1, 2)
        for name in "qkv"
    )
    cos, sin = target().model.rotary_emb(read, torch.arange(width)[None])

    def turned(x: Tensor) -> Tensor:
        return x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]

    scores = turned(q) @ turned(k).repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(width, width).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    after = hidden + mixed @ own["model.layers.2.self_attn.o_proj.weight"].T
    wanted = target().lm_head(normed(after, own["model.norm.weight"]))
    torch.testing.assert_close(logits(made), wanted, atol=1e-4, rtol=1e-4)


# Drafts never show.


@FORMS
def test_drafts_are_those_of_a_naive_forward(tree, rows):
    """With caches dropped at random between rounds: nothing changes but speed."""
    kept, dropped = (Watched(learned(), tree=tree, forget=forget) for forget in (False, True))
    plain = target().generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **LONG)
    assert torch.equal(written(kept, rows, **LONG), plain)
    assert torch.equal(written(dropped, rows, **LONG), plain)
    assert kept.drafts == dropped.drafts
    assert len(kept.errors) > 10 * rows
    assert max(kept.errors + dropped.errors) < 1e-4


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layers", [1, 2])
@EVERY
def test_the_text_is_the_targets(layers, rows, every):
    """As a chain, a tree, a level of a cascade, and as the reviewer of another drafter."""
    made = learned(layers)
    plain = target().generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **GREEDY)
    seeds = {**SAMPLED, "row_seeds": SAMPLED["row_seeds"][:rows]}
    drawn = written(MaxGram(), rows, **seeds)
    cascade = CascadeDrafter([made, MaxGram()])
    drafters = (ModelDrafter(made), ModelDrafter(made, tree=BestFirst(3, 12)), cascade, Vertical(made, MaxGram()))
    for drafter, draws in each_way(drafters, rows, every):
        assert torch.equal(written(drafter, rows, **(seeds if draws else GREEDY)), drawn if draws else plain)


@DRAWS
@pytest.mark.parametrize("tree", [None, Sampled()], ids=["chain", "tree"])
def test_independent_draws_have_the_targets_distribution(tree, count):
    drawn_as_the_target(ModelDrafter(learned(), tree=tree), "rejection" if tree is None else "k_seq", count)


def test_it_has_learned_to_draft():
    """Else the tests above would show little: no token of a draft would ever become text."""
    kept = [
        written(ModelDrafter(made), return_dict_in_generate=True, **GREEDY).report.block_efficiency
        for made in (new(), learned())
    ]
    assert kept[1] > max(1.3, kept[0])


def test_the_papers_early_stop_is_a_schedule():
    """A draft ends with the first token that it is unsure of."""
    plain = target().generate(**ragged_batch(PROMPTS), pad_token_id=0, **GREEDY)
    lengths = []
    for threshold in (0.0, 0.3, 1.0):
        options = {**FIXED, "schedule": Confidence(threshold, 6), "return_dict_in_generate": True}
        out = target().generate(**ragged_batch(PROMPTS), assistant=ModelDrafter(learned()), **options, **GREEDY)
        assert torch.equal(out.sequences, plain)
        tally = out.report.target
        lengths.append(sum(tally.drafted.values()) / (tally.rounds - tally.plain))
    assert lengths[0] > lengths[1] > lengths[2] == 1


# One set of weights.


def test_all_but_the_adapter_is_the_targets():
    model = fresh("llama", num_hidden_layers=3, tie_word_embeddings=True)
    flags, config = [p.requires_grad for p in model.parameters()], model.config.to_dict()
    made = make_student(model, init={"kangaroo": {"layers": 2}})
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    for name, parameter in made.named_parameters():
        assert (parameter.data_ptr() in theirs) is (name not in trained(made))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config.to_dict() == config
    added = sum(parameter.numel() for parameter in trained(made).values())
    assert added == 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32
    assert added_share(made, model) == added / model.num_parameters()


def test_a_step_changes_the_adapter_alone():
    made = new(2)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    theirs = {key: tensor.clone() for key, tensor in target().state_dict().items()}
    step = Distillation(made, target(), OBJECTIVE).train()
    optimizer = torch.optim.SGD(trained(made).values(), 1.0)
    loss = step(**batch())
    loss.backward()
    optimizer.step()
    changed = {key for key, tensor in made.state_dict().items() if not torch.equal(tensor, before[key])}
    assert loss > 0
    assert changed == trained(made).keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in target().state_dict().items())


def test_a_bfloat16_target(tmp_path):
    """Trained in float32 throughout; on the target its layers are shared, and the adapter is in its type."""
    low = copy.deepcopy(target()).bfloat16()
    made = new(1, low)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert added_share(made, low) == sum(p.numel() for p in trained(made).values()) / low.num_parameters()
    assert Distillation(made, low, OBJECTIVE)(**batch()) > 0
    save_student(made, tmp_path)
    network = as_drafter(ModelDrafter(tmp_path), low).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    theirs = {parameter.data_ptr() for parameter in low.parameters()}
    own = {name for name, parameter in network.named_parameters() if parameter.data_ptr() not in theirs}
    assert own == trained(made).keys()


@pytest.mark.slow
def test_the_trainer_trains_it(tmp_path):
    """Partly on its own texts; what it saves drafts for the target as it is loaded again."""
    pair = make_pair(tmp_path)
    before = load_file(pair / "target" / "model.safetensors")
    prompts = {"eval_prompts": str(pair / "prompts.jsonl"), "eval_on_start": True, "eval_limit": 4}
    changes = {"student": None, "init": {"kangaroo": {"layers": 1}}, "max_steps": 30, "save_steps": 15}
    exam = {"eval_new_tokens": 16, "eval_depth": 4, "eval_strategy": "steps", "eval_steps": 30}
    run = distill(arguments(pair, "adapter", **changes, **exam, **prompts, on_policy=0.2))
    first, last = (entry for entry in run.state.log_history if "eval_acceptance" in entry)
    assert last["eval_acceptance"] > first["eval_acceptance"]
    run.create_model_card()
    assert f"It adds {100 * added_share(run.model, run.target):.2f} %" in (pair / "adapter" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(pair / "target").eval()
    assert all(torch.equal(run.target.get_parameter(name), tensor) for name, tensor in before.items())
    inputs, how = {"input_ids": torch.arange(5, 25)[None]}, {"max_new_tokens": 16, "do_sample": False}
    drafted = model.generate(**inputs, **how, assistant=str(pair / "adapter"), strict=True)
    assert torch.equal(drafted, model.generate(**inputs, **how))
    made = {"init": None, "student": str(pair / "adapter"), "max_steps": 1, "save_steps": 1}
    again = distill(arguments(pair, "again", **changes | made))
    assert trained(again.model).keys() == trained(run.model).keys()


# On disk.


def test_what_is_saved_is_what_is_loaded(tmp_path):
    made = new()
    save_student(made, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"drafter.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == trained(made).keys()
    found = as_drafter(ModelDrafter(tmp_path), target()).network
    assert torch.equal(logits(found), logits(made))
    assert not trained(found)
    with torch.inference_mode():
        again = as_drafter(ModelDrafter(tmp_path), target()).network
    assert not any(parameter.is_inference() for parameter in again.parameters())
    assert kind_asked(str(tmp_path), None, None) is kind_asked(None, {"kangaroo": {}}, None)
    cascade = CascadeDrafter([ModelDrafter(tmp_path), MaxGram()], [4, 4])
    cascade.save_pretrained(tmp_path / "cascade")
    plain = target().generate(**prompt(), max_new_tokens=16)
    for path in (tmp_path, tmp_path / "cascade"):
        drafted = target().generate(**prompt(), assistant=str(path), strict=True, max_new_tokens=16)
        assert torch.equal(drafted, plain)


def test_a_folder_that_was_written_again_is_loaded_again(tmp_path):
    """A path is loaded once for many calls."""
    kept = []
    for made in (new(), learned()):
        save_student(made, tmp_path)
        found = [as_drafter(str(tmp_path), target()) for _ in range(2)]
        assert found[0].network is found[1].network
        assert torch.equal(logits(found[0].network), logits(made))
        kept.append(found[0].network)
    assert kept[0] is not kept[1]


def test_it_is_trained_on(tmp_path):
    """A stored one, and a checkpoint in one that was made in the same way. What is stored stays as it is."""
    made = new()
    save_student(made, tmp_path)
    stored = load_model(str(tmp_path))
    opened, resumed = stored.open(target(), torch.float32), new(1)
    assert trained(opened).keys() == trained(made).keys()
    with torch.no_grad():
        for parameter in trained(opened).values():
            parameter.zero_()
        for parameter in trained(resumed).values():
            parameter.zero_()
    load_student_weights(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(made))
    assert torch.equal(logits(stored.bind(target())), logits(made))
    with pytest.raises(ValueError, match=r"holds another student.*layers\.1\."):
        load_student_weights(new(2), tmp_path)


def test_a_folder_of_another_target_or_with_other_tensors_is_refused(tmp_path):
    save_student(new(), tmp_path)
    file, document = tmp_path / "model.safetensors", tmp_path / "drafter.json"
    state, text = load_file(file), document.read_text()
    with pytest.raises(ValueError, match=r"fingerprint sha256:.*train one for this target"):
        load_model(str(tmp_path)).bind(fresh("llama", 5, num_hidden_layers=3))
    norm = "model.norm.weight"
    embedding = target().get_input_embeddings().weight.detach()
    for tampered, says in (
        ({norm: None}, rf"lacks {norm}"),
        ({norm: torch.ones(31)}, rf"{norm} has shape \(31,\).* must have \(32,\)"),
        ({"model.embed_tokens.weight": embedding.clone()}, r"does not know .*model\.embed_tokens\.weight"),
        ({"other": torch.ones(2)}, "does not know .*other"),
    ):
        save_file({key: tensor for key, tensor in (state | tampered).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=says):
            load_model(str(tmp_path)).bind(target())
    save_file(state, file)
    for key, value, says in (
        ("layers", 2, "does not fit the target's first 2 layers"),
        ("layers", 3, "layers=3 must be from 1 to 2"),
        ("layers", "1", "drafter.json: layers"),
        ("base", {"name": "tiny"}, "drafter.json: base"),
    ):
        document.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(ValueError, match=says):
            load_model(str(tmp_path)).bind(target())
    document.write_text(text)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_model(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match=r"has none of model\.safetensors"):
        load_model(str(tmp_path))


def test_no_engine_has_it(tmp_path):
    save_student(new(), tmp_path / "adapter")
    target().save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="kangaroo adapter, which no engine has"):
        export_drafter(str(tmp_path / "adapter"), str(tmp_path / "out"), "vllm", target=str(tmp_path / "target"))
    assert not Path(tmp_path, "out").exists() or not any(Path(tmp_path, "out").iterdir())


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", {"layers": 0}, "layers=0 must be from 1 to 1"),
        ("llama", {"layers": 2}, "layers=2 must be from 1 to 1"),
        ("llama", {"layer": 1}, "layer"),
        ("llama", {"layers": True}, "layers"),
        ("t5", {"layers": 1}, "is an encoder-decoder"),
        ("bart", {"layers": 1}, "of encoder-decoders only"),
    ],
)
def test_options_of_which_nothing_can_be_made(family, options, says):
    with pytest.raises(ValueError, match=says):
        check_student(fresh(family).config, init={"kangaroo": options})


def test_targets_of_which_nothing_can_be_made():
    with pytest.raises(ValueError, match=r"'opt' model have no part called mlp"):
        make_student(fresh("opt"), init={"kangaroo": {"layers": 1}})
    with pytest.raises(ValueError, match="peft with init: a new student is trained whole"):
        check_student(target().config, init={"kangaroo": {}}, peft={"r": 2})
