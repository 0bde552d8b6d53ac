"""A head is trained by the trainer of all students, saved as serving engines load it, and opened as any drafter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers.pair import arguments, make_pair
from transformers import AutoModelForCausalLM

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.cli import main
from csdraft.data.target_cache import FeatureArguments, cache_features
from csdraft.heads.formats.eagle3 import Eagle3Head
from csdraft.models import load_model
from csdraft.trainers.run import distill
from csdraft.trainers.students import check_student, load_student_weights, make_student
from tests.heads.learned import LAYERS, new_head, target
from tests.tiny import ragged_batch

INIT = {"eagle3": {"layers": [0, 1, 2], "draft_vocab": 200, "steps": 3}}
EXAM = {"eval_new_tokens": 16, "eval_depth": 4, "eval_strategy": "steps", "eval_steps": 30, "eval_limit": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def run(pair) -> Any:
    """A head after 30 steps on packed texts; its trainer."""
    prompts = {"eval_prompts": str(pair / "prompts.jsonl"), "eval_on_start": True}
    changes = {"student": None, "init": INIT, "packing": True, "max_length": 96, "max_steps": 30, "save_steps": 15}
    return distill(arguments(pair, "head", **changes, **EXAM, **prompts))


def test_a_head_learns_and_drafts_from_its_folder(pair, run):
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    first, last = (entry for entry in run.state.log_history if "eval_acceptance" in entry)
    assert last["eval_acceptance"] > first["eval_acceptance"]
    model = AutoModelForCausalLM.from_pretrained(pair / "target").eval()
    inputs = {"input_ids": torch.arange(5, 25)[None]}
    how = {"max_new_tokens": 16, "do_sample": False}
    plain = model.generate(**inputs, **how)
    for assistant in (str(pair / "head"), CascadeDrafter([str(pair / "head"), MaxGram()])):
        drafted = model.generate(**inputs, **how, assistant=assistant, schedule="fixed", strict=True)
        assert torch.equal(drafted, plain)


def test_its_card_says_how_engines_serve_it(pair, run):
    run.create_model_card()
    text = (pair / "head" / "README.md").read_text()
    assert "vLLM and SGLang load this folder as it is" in text
    assert 'vllm serve target --speculative-config \'{"method": "eagle3", "model": "head"' in text
    assert "--speculative-draft-model-path head" in text


def test_it_keeps_the_most_frequent_tokens_of_the_training_text(run):
    texts = run.train_dataset.data
    labels = torch.cat([texts[index]["labels"] for index in range(len(texts))])
    counts = torch.bincount(labels[labels >= 0], minlength=run.model.config.vocab_size)
    kept = set(run.model.drafted.tolist())
    assert len(kept) == 200
    others = [int(count) for token, count in enumerate(counts) if token not in kept]
    assert max(others) <= min(int(counts[token]) for token in kept - {run.target.generation_config.eos_token_id})


def test_a_step_changes_the_heads_weights_alone(pair):
    before = AutoModelForCausalLM.from_pretrained(pair / "target").state_dict()
    changes = {"student": None, "init": INIT, "max_steps": 1, "save_steps": 1}
    trainer = distill(arguments(pair, "one", **changes))
    after = trainer.target.state_dict()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    fresh = make_student(trainer.target, init=INIT, counts=lambda: torch.arange(after["lm_head.weight"].shape[0]))
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, fresh.get_parameter(name))}
    assert "embed_tokens.weight" not in moved
    assert "fc.weight" in moved
    stored = load_file(pair / "one" / "model.safetensors")
    assert stored.keys() == {*trainer.model.state_dict(), "t2d"} - {"embed_tokens.weight"}


def test_a_run_goes_on_from_its_checkpoint(pair, run):
    made = make_student(run.target, init=INIT, counts=lambda: torch.arange(run.model.config.vocab_size))
    load_student_weights(made, pair / "head")
    state = run.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    other = make_student(
        run.target,
        init={"eagle3": {**INIT["eagle3"], "draft_vocab": 100}},
        counts=lambda: torch.arange(run.model.config.vocab_size),
    )
    with pytest.raises(ValueError, match="another student"):
        load_student_weights(other, pair / "head")
    again = make_student(run.target, str(pair / "head"))
    assert torch.equal(again.fc.weight, run.model.fc.weight)
    assert again.midlayer.mlp.up_proj.weight.requires_grad


def test_how_a_head_is_trained_is_kept_in_its_folder(run, tmp_path):
    """Else training on from a folder would unroll other steps than before."""
    made = make_student(run.target, init={"eagle3": {"layers": [0, 1, 2], "steps": 2, "decay": 0.5}})
    Eagle3Head.of(made).save(tmp_path)
    again = make_student(run.target, str(tmp_path))
    assert (again.options.steps, again.options.decay) == (2, 0.5)
    assert (again.options.steps, again.options.decay) == (2, 0.5)


def test_a_head_of_all_tokens_goes_on_from_its_checkpoint(run, tmp_path):
    """Its offsets are all 0, and not stored."""
    init = {"eagle3": {"layers": [0, 1, 2]}}
    made, other = (make_student(run.target, init=init) for _ in range(2))
    torch.nn.init.normal_(made.fc.weight)
    Eagle3Head.of(made).save(tmp_path / "full")
    assert "d2t" not in load_file(tmp_path / "full" / "model.safetensors")
    load_student_weights(other, tmp_path / "full")
    assert torch.equal(other.fc.weight, made.fc.weight)
    assert int(other.d2t.abs().max()) == 0


def test_cached_features_train_the_same_head(pair, run):
    """The loss of one step, up to bfloat16, without a forward of the target; a cache that lacks a layer is refused."""
    texts, layers = str(pair / "texts.jsonl"), INIT["eagle3"]["layers"]
    written = {"target": str(pair / "target"), "dataset": texts, "max_length": 96}
    cache_features(FeatureArguments(**written, layers=layers, output_dir=str(pair / "features")))
    changes = {"student": None, "init": INIT, "packing": True, "max_length": 96, "max_steps": 4, "save_steps": 4}
    online = distill(arguments(pair, "online", **changes, logging_steps=1))
    offline = distill(arguments(pair, "offline", **changes, logging_steps=1, target_cache=str(pair / "features")))
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (online, offline)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    calls = []
    offline.target.model.register_forward_hook(lambda *_: calls.append(1))
    batch = next(iter(offline.get_train_dataloader()))
    offline._pair(**batch, total=1.0)
    assert not calls
    cache_features(FeatureArguments(**written, layers=layers[:1], output_dir=str(pair / "fewer")))
    with pytest.raises(ValueError, match=r"of layers \[0\] and lack \[1, 2\]"):
        distill(arguments(pair, "refused", **changes, target_cache=str(pair / "fewer")))


# Folders.


@pytest.fixture
def stored(tmp_path) -> Path:
    Eagle3Head.of(new_head()).save(tmp_path / "head")
    return tmp_path / "head"


def edit(folder: Path, **changes: Any) -> None:
    """Changes config.json; None takes a key away."""
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(folder: Path) -> torch.Tensor:
    """What the loaded head says, on the target."""
    head: Any = as_drafter(ModelDrafter(folder), target()).network
    states = dict(enumerate(target()(**ragged_batch((12,)), output_hidden_states=True).hidden_states))
    ids = ragged_batch((12,))["input_ids"]
    return head.along(states, ids, torch.arange(12)[None], torch.ones_like(ids))


def test_what_is_saved_is_what_is_loaded(stored):
    head = new_head()
    states = dict(enumerate(target()(**ragged_batch((12,)), output_hidden_states=True).hidden_states))
    ids = ragged_batch((12,))["input_ids"]
    assert torch.equal(logits_of(stored), head.along(states, ids, torch.arange(12)[None], torch.ones_like(ids)))
    document = json.loads((stored / "config.json").read_text())
    assert document["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    assert document["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [layer - 1 for layer in LAYERS]
    assert document["architectures"] == ["LlamaForCausalLMEagle3"]
    assert document["norm_before_residual"] is False
    found = tensors(stored)
    assert found["d2t"].dtype == torch.long
    assert torch.equal(found["t2d"].nonzero()[:, 0], head.drafted)


@torch.no_grad()
def test_other_layouts_are_the_same_head(stored):
    """Layer names of vLLM, a prefix, an architecture that says nothing, an old rope_theta, no drafter.json."""
    wanted, state = logits_of(stored), tensors(stored)
    renamed = {f"model.{name}".replace("midlayer.", "layers.0."): tensor for name, tensor in state.items()}
    save_file(
        {name.removeprefix("model.") if name == "d2t" else name: t for name, t in renamed.items()},
        stored / "model.safetensors",
    )
    (stored / "drafter.json").unlink()
    edit(stored, architectures=["LlamaForCausalLM"], rope_parameters=None, eagle_config=None)
    assert torch.equal(logits_of(stored), wanted)
    edit(stored, draft_vocab_size=None)  # then nothing in the config says what it is
    with pytest.warns(UserWarning, match="draft_vocab_size is not set: 60 is assumed"):
        assert torch.equal(logits_of(stored), wanted)
    edit(stored, draft_vocab_size=60)
    torch.save(state, stored / "pytorch_model.bin")
    (stored / "model.safetensors").unlink()
    assert torch.equal(logits_of(stored), wanted)


@torch.no_grad()
def test_the_layout_of_speculators(stored):
    wanted, document = logits_of(stored), json.loads((stored / "config.json").read_text())
    own = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "norm_before_residual")
    layer = {key: value for key, value in document.items() if key not in (*own, "architectures", "eagle_config")}
    edit(stored, **dict.fromkeys(document), **{})
    written = {key: document[key] for key in own} | {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
    }
    (stored / "config.json").write_text(json.dumps(written | {"architectures": ["Eagle3DraftModel"]}))
    state = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors(stored).items()}
    save_file(state | {"embed_tokens.weight": new_head().embed_tokens.weight.detach()}, stored / "model.safetensors")
    assert torch.equal(logits_of(stored), wanted)


def test_what_a_config_leaves_open_is_said(stored):
    edit(stored, eagle_aux_hidden_state_layer_ids=None, eagle_config=None, draft_vocab_size=None, num_hidden_layers=32)
    with pytest.warns(UserWarning, match=r"=32.*after blocks 2, L/2 and L - 3.*draft_vocab_size is not set: 60 is"):
        load_model(str(stored))


def damaged(name: str, change: Any) -> Any:
    def of(folder: Path) -> None:
        state = tensors(folder)
        made = change(state.pop(name, None))
        save_file(state if made is None else {**state, name: made}, folder / "model.safetensors")

    return of


def pickled(content: Any) -> Any:
    def of(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return of


def test_how_weights_are_stored_is_of_no_account(stored):
    before = logits_of(stored)
    torch.save(tensors(stored), stored / "pytorch_model.bin")
    (stored / "model.safetensors").unlink()
    edit(stored, dtype="x", torch_dtype=[], quantization_config=[])
    assert torch.equal(logits_of(stored), before)


def test_weights_in_several_files_are_read(stored):
    """Also of a head with the architecture of every Llama model, which only the names of its tensors tell apart."""
    before = logits_of(stored)
    write_parts(stored)
    assert torch.equal(logits_of(stored), before)
    edit(stored, architectures=["LlamaForCausalLM"], draft_vocab_size=None)
    with pytest.warns(UserWarning, match="draft_vocab_size is not set"):
        assert torch.equal(logits_of(stored), before)
    Path(stored, "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-2\.safetensors; get its safetensors files too"):
        load_model(str(stored))


def write_parts(folder: Path) -> None:
    """Puts a folder's tensors into two files with an index."""
    state, weight_map = tensors(folder), {}
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        file, names = f"model-{number}.safetensors", sorted(state)[number - 1 :: 2]
        save_file({name: state[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.filterwarnings("ignore:.*is not set")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damaged("midlayer.hidden_norm.weight", lambda _: None), r"lacks midlayer\.hidden_norm\.weight"),
        (damaged("d2t", lambda _: None), "lacks d2t"),
        (damaged("fc.bias", lambda _: torch.zeros(32)), r"does not know .*fc\.bias"),
        (damaged("lm_head.weight", lambda old: old[:50].clone()), r"lm_head\.weight has shape \(50, 32\)"),
        (damaged("d2t", lambda old: old + 40), "d2t must hold offsets"),
        (damaged("d2t", lambda old: -torch.arange(60)), "d2t must hold offsets"),
        (damaged("d2t", lambda old: old.float()), r"d2t is torch\.float32, not torch\.int64"),
        (damaged("d2t", lambda old: old.bool()), r"d2t is torch\.bool, not torch\.int64"),
        (damaged("fc.weight", lambda old: old.char()), r"fc\.weight is torch\.int8, not torch\.float32"),
        (
            lambda folder: edit(folder, eagle_aux_hidden_state_layer_ids=[-1, 1, 3]),
            r"\[-1, 1, 3\]; they are counted from 0",
        ),
        (lambda folder: edit(folder, partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5; csdraft's heads"),
        (lambda folder: edit(folder, norm_before_residual="yes"), "norm_before_residual"),
        (lambda folder: edit(folder, fc_norm=True), r"lacks fc_norm\.0\.weight"),
        (lambda folder: edit(folder, vocab_size=None), "vocab_size"),
        (lambda folder: edit(folder, model_type="qwen3"), r"lacks midlayer\.self_attn\.k_norm"),
        (lambda folder: edit(folder, model_type="gemma3"), "model_type='gemma3'"),
        (lambda folder: edit(folder, layer_types=["sliding_attention"]), "layer_types"),
        (lambda folder: edit(folder, speculators_model_type="dspark"), "speculators_model_type='dspark'"),
        (lambda folder: edit(folder, draft_vocab_size=0), "draft_vocab_size=0"),
        (lambda folder: edit(folder, num_attention_heads="many"), "not a config of a Llama layer"),
        (lambda folder: edit(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (
            lambda folder: edit(folder, rope_parameters={"rope_type": "x", "rope_theta": 1e4}),
            "not a config of .*KeyError",
        ),
        (lambda folder: edit(folder, rope_parameters={"rope_theta": "x"}), "not a config of a Llama layer"),
        (lambda folder: edit(folder, id2label=[]), "not a config of a Llama layer"),
        (lambda folder: edit(folder, hidden_act="x"), "hidden_act='x' is unknown"),
        (lambda folder: edit(folder, quantization_config={"bits": 4}), "not quantised"),
        (pickled([1]), "other things than tensors by name"),
        (pickled({"fc.weight": 1}), "other things than tensors by name"),
        (pickled({"a": Path("a")}), "other things than tensors, or"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"none of model\.safetensors"),
    ],
)
def test_a_tampered_folder_is_refused(stored, damage, says):
    damage(stored)
    with pytest.raises(ValueError, match=says):
        load_model(str(stored))


def test_another_target_is_refused(stored):
    from tiny import fresh

    with pytest.raises(ValueError, match="was trained on tiny"):
        as_drafter(ModelDrafter(stored), fresh("llama", seed=3, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"after blocks \[0, 1, 3\], and the target has 2"):
        as_drafter(ModelDrafter(stored), fresh("llama"))
    with pytest.raises(ValueError, match="hidden_size=32"):
        as_drafter(ModelDrafter(stored), fresh("llama", hidden_size=64))


def test_a_cascade_with_a_head_can_be_saved(stored, tmp_path):
    CascadeDrafter([ModelDrafter(stored), MaxGram()]).save_pretrained(tmp_path / "cascade")
    shutil.rmtree(stored)
    cascade = CascadeDrafter.from_pretrained(tmp_path / "cascade", target=target())
    inputs, how = ragged_batch((20, 3, 11)), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target().generate(**inputs, **how)
    assert torch.equal(target().generate(**inputs, **how, assistant=cascade, strict=True, schedule="fixed"), plain)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [0, 9, 2]}, "rising numbers"),
        ({}, "name others by layers"),
        ({"layers": [0, 1, 2], "draft_vocab": 0}, "draft_vocab=0"),
        ({"layers": [0, 1, 2], "steps": 0}, "steps=0"),
        ({"layers": [0, 1, 2], "width": 3}, "width"),
        ({"layers": [0, 1, 2], "config": {"hidden_size": 9}}, "hidden_size"),
    ],
)
def test_options_of_no_head_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        check_student(target().config, init={"eagle3": options})


@pytest.mark.parametrize("start", ["init", "student"])
def test_texts_of_no_features_are_refused(pair, stored, start):
    """Also for a head from elsewhere, which has no drafter.json."""
    (stored / "drafter.json").unlink()
    changes = {"student": None, "init": INIT} if start == "init" else {"student": str(stored)}
    with pytest.raises(ValueError, match=r"on_policy=0\.5 with a head"):
        distill(arguments(pair, "refused", **changes, on_policy=0.5))


def test_commands_take_a_head_as_a_drafter_alone(pair, run, capsys):
    head, prompts = str(pair / "head"), ["--prompts", str(pair / "prompts.jsonl"), "--limit", "1"]
    target, short = ["--target", str(pair / "target")], ["--max-new-tokens", "4", "--repetitions", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert main(["bench", *target, "--drafter", head, *prompts, *short, *threads]) == 0
    said = capsys.readouterr().out
    assert "head" in said
    assert "assistant_model" not in said
    few = [*short, "--minutes", "0.02", "--tree-nodes", "--finalists", "1", "--save", str(pair / "tuned")]
    assert main(["tune", *target, "--drafter", head, "--drafter", "max_gram", *prompts, *few, *threads]) == 0
    assert (pair / "tuned" / "cascade.json").is_file()
    assert main(["generate", "--target", head, "--prompt", "x"]) == 2
    assert "cannot run alone; name that model as --target" in capsys.readouterr().err
    assert main(["doctor", head]) == 1
    assert "cannot run alone" in capsys.readouterr().out


def test_what_a_folder_holds_is_printed(stored, capsys):
    assert main(["inspect", str(stored)]) == 0
    said = capsys.readouterr().out
    assert "EAGLE-3 head" in said
    assert "after blocks 0, 1, 3" in said
    assert said.count("loads it") == 2
    edit(stored, architectures=["LlamaForCausalLM"], eagle_config=None)
    main(["inspect", str(stored)])
    assert "architectures[0]='LlamaForCausalLM'" in capsys.readouterr().out
    assert main(["inspect", "models/smol-target"]) == 2
    assert "holds no head that csdraft knows" in capsys.readouterr().err
    assert main(["inspect", str(stored / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["inspect", str(stored.parent)]) == 2
    assert "does not exist or holds no head that csdraft knows" in capsys.readouterr().err
