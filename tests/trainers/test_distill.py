"""The drafter trainer: what it changes, that a step does not depend on how it is cut up, that it resumes exactly."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, Trainer, TrainerCallback

import csdraft
from csdraft.data.packing import padded_prompts
from csdraft.data.sources import read_rows
from csdraft.data.target_cache import TargetCache
from csdraft.trainers import run
from csdraft.trainers.arguments import make_arguments
from csdraft.trainers.distill import DistillArguments, DrafterTrainer
from csdraft.trainers.evaluation import Evaluation
from csdraft.trainers.run import distill
from csdraft.trainers.stops import Interrupt
from tests.tiny import on_target
from tests.trainers.pair import arguments, make_pair

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts/distill_drafter.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("distill"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def losses(trainer: DrafterTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_student_comes_nearer_to_the_target(folder):
    trainer = distill(arguments(folder, "nearer", max_steps=40))
    assert sum(losses(trainer)[-5:]) < 0.7 * sum(losses(trainer)[:5])


def test_only_the_student_changes(folder):
    before = weights(folder / "target")
    trainer = distill(arguments(folder, "only", max_steps=2))
    after = trainer.target.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in trainer.target.parameters())
    moved = largest_difference(weights(folder / "student"), weights(folder / "only"))
    assert moved > 1e-3
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.student.parameters()}


class Seen(TrainerCallback):
    """Notes the models that callbacks are shown."""

    def __init__(self):
        self.models: set[int] = set()

    def on_step_end(self, args, state, control, model=None, **others):
        self.models.add(id(model))


def test_the_trainer_is_called_as_trainer_is_and_its_model_is_the_student(folder):
    """Names and order of `transformers.Trainer`; before, during and after training, in checkpoints and in the end."""
    names = list(inspect.signature(DrafterTrainer.__init__).parameters)
    assert names[:7] == list(inspect.signature(Trainer.__init__).parameters)[:7]
    student, target = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "target"))
    args = arguments(folder, "as-trainer", max_steps=4, save_steps=2)
    tokenizer, seen = AutoTokenizer.from_pretrained(folder / "target"), Seen()
    _, _, batches = run.prepare(args)
    trainer = DrafterTrainer(
        model=student,
        args=args,
        target=target,
        **batches,
        eval_dataset=[[5, 6, 7], [8, 9]],
        processing_class=tokenizer,
        callbacks=[seen],
    )
    assert trainer.model is trainer.student is student
    trainer.train()
    assert trainer.model is trainer.student is student
    assert seen.models == {id(student)}
    assert trainer.evaluate()["eval_block_efficiency"] >= 1
    trainer.save_model()
    for place in ("as-trainer", "as-trainer/checkpoint-4"):
        assert largest_difference(weights(folder / place), {k: v.cpu() for k, v in student.state_dict().items()}) == 0
    resumed = AutoModelForCausalLM.from_pretrained(folder / "student")
    again = DrafterTrainer(resumed, args, target=target, **batches, processing_class=tokenizer)
    again.train(resume_from_checkpoint=str(folder / "as-trainer/checkpoint-2"))
    assert largest_difference(resumed.state_dict(), student.state_dict()) == 0
    with pytest.raises(ValueError, match="no prompts to evaluate on"):
        again.evaluate()


@pytest.mark.parametrize("on_policy", [0.0, 0.7])
def test_a_step_does_not_depend_on_how_it_is_accumulated(folder, on_policy):
    """Rows of unequal lengths: a mean of means would weigh them differently."""
    changes = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "on_policy": on_policy}
    whole, parts = f"whole-{on_policy}", f"parts-{on_policy}"
    distill(arguments(folder, whole, **changes))
    distill(arguments(folder, parts, per_device_train_batch_size=1, gradient_accumulation_steps=8, **changes))
    moved = largest_difference(weights(folder / "student"), weights(folder / whole))
    assert largest_difference(weights(folder / whole), weights(folder / parts)) < 1e-4 * moved


@pytest.mark.slow
def test_on_policy_texts_are_the_students(folder):
    """With a share of 1 the gradient differs from the corpus's, and the same run twice does not."""
    changes = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    distill(arguments(folder, "corpus-run", **changes))
    first = distill(arguments(folder, "policy-1", on_policy=1.0, **changes))
    second = distill(arguments(folder, "policy-2", on_policy=1.0, **changes))
    assert losses(first) == losses(second)
    assert largest_difference(weights(folder / "policy-1"), weights(folder / "policy-2")) == 0
    assert largest_difference(weights(folder / "policy-1"), weights(folder / "corpus-run")) > 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(folder):
    whole = distill(arguments(folder, "uninterrupted", max_steps=6, on_policy=0.5))
    distill(arguments(folder, "resumed", max_steps=6, on_policy=0.5, num_train_epochs=1))  # makes checkpoint-2 and -4
    for name in ("checkpoint-6",):
        for file in (folder / "resumed" / name).iterdir():
            file.unlink()
        (folder / "resumed" / name).rmdir()
    again = distill(arguments(folder, "resumed", max_steps=6, on_policy=0.5))
    assert losses(again) == losses(whole)
    assert largest_difference(weights(folder / "uninterrupted"), weights(folder / "resumed")) == 0


def test_one_signal_may_come_twice(monkeypatch):
    """A launcher passes on what a scheduler has sent to all; later ones act as ever.

    No signal is sent, which Python may handle later: the handler is called instead.
    """
    clock, sent, before = [10.0], [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("csdraft.trainers.stops.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("csdraft.trainers.stops.signal.raise_signal", sent.append)
    interrupt = Interrupt()
    interrupt.on_train_begin(None, None, None)
    try:
        handler = signal.getsignal(signal.SIGINT)
        for clock[0] in (10.0, 10.1, 12.9):
            handler(signal.SIGINT, None)
        assert interrupt.stopped
        assert not sent
        clock[0] = 13.1
        handler(signal.SIGINT, None)
        assert sent == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        interrupt.restore()


def test_a_target_that_drafts_for_itself_gets_full_marks(folder):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target.generation_config.eos_token_id = None
    prompts = [tokenizer(text)["input_ids"] for text in ("x1 = y", "x2 = y + 3\n", "x")]
    evaluation = Evaluation(prompts, tokenizer.pad_token_id, depth=3, new_tokens=16)
    figures = evaluation.grade(evaluation.run(target, target))
    assert figures["agreement"] == 1
    assert figures["acceptance"] == pytest.approx(1, abs=1e-5)
    assert figures["block_efficiency"] == 4
    assert figures["block_efficiency_sampled"] == 4
    assert [figures[f"accepted_{n}"] for n in (1, 2, 3)] == [1, 1, 1]


def test_texts_that_end_early_count_up_to_their_end(folder):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    prompts = [tokenizer(text)["input_ids"] for text in ("x1 = y", "x2 = y + 3\n")]
    target.generation_config.eos_token_id = None
    inputs = padded_prompts(prompts, tokenizer.pad_token_id, target.device)
    third = target.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)[:, -1].tolist()
    target.generation_config.eos_token_id = third  # both rows end after three tokens, or before
    sums = Evaluation(prompts, tokenizer.pad_token_id, depth=2, new_tokens=24).run(target, target)
    assert 2 <= sums["compared_greedy"] <= 6
    assert sums["compared_greedy"] == sum(sums[f"greedy_emitted_by_{place}"] for place in (0, 1))


def test_a_token_for_the_hub_is_not_published(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["distill_drafter.py", "hub_token=hf_secret", "max_steps=1"])
    distill(arguments(folder, "secret", max_steps=1))
    told = (folder / "secret/provenance.json").read_text()
    assert "hf_secret" not in told
    assert "max_steps=1" in told


def test_the_evaluation_is_the_training_metric(folder):
    trainer = distill(
        arguments(
            folder, "metric", max_steps=4, eval_strategy="steps", eval_steps=2, eval_prompts=f"{folder}/prompts.jsonl",
            eval_new_tokens=12, metric_for_best_model="block_efficiency", load_best_model_at_end=True,
        )
    )  # fmt: skip
    seen = [entry["eval_block_efficiency"] for entry in trainer.state.log_history if "eval_block_efficiency" in entry]
    assert len(seen) == 2
    assert trainer.state.best_metric == max(seen) >= 1
    found = trainer.evaluate()["eval_block_efficiency"]
    assert found == max(seen)


@pytest.mark.slow
def test_curves_reach_tensorboard(folder, monkeypatch):
    """Block efficiency, and the overlap by the place in the text."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    trainer = distill(
        arguments(
            folder, "curves", max_steps=2, eval_strategy="steps", eval_steps=1, eval_new_tokens=5,
            eval_prompts=f"{folder}/prompts.jsonl", report_to="tensorboard",
        )
    )  # fmt: skip
    events = accumulator.EventAccumulator(str(folder / "events"))
    events.Reload()
    for name in ("block_efficiency", "acceptance", *(f"acceptance_from_{n}" for n in (1, 2, 4)), "accepted_1"):
        logged = [entry[f"eval_{name}"] for entry in trainer.state.log_history if f"eval_{name}" in entry]
        assert len(logged) == 2, name
        assert [event.value for event in events.Scalars(f"eval/{name}")] == pytest.approx(logged)
    assert "eval/acceptance_from_8" not in events.Tags()["scalars"]


def test_the_overlap_is_told_apart_by_the_place_in_the_text(folder):
    """Against both models' distributions, row by row; the drafter is far from the target."""
    names = ("target", "student")
    target, student = (AutoModelForCausalLM.from_pretrained(folder / name).float().eval() for name in names)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target.generation_config.eos_token_id = None
    prompts = [tokenizer(text)["input_ids"] for text in ("x1 = y", "x2 = y + 3\n")]
    evaluation = Evaluation(prompts, tokenizer.pad_token_id, depth=2, new_tokens=6)
    figures = evaluation.grade(evaluation.run(target, student))
    found: dict[int, list[float]] = {1: [], 2: [], 4: []}
    width = max(map(len, prompts))
    for prompt, text in zip(prompts, evaluation._written[True, 0], strict=True):
        ids = text[width - len(prompt) :][None]
        with torch.no_grad():
            both = torch.stack([model(ids).logits[0].softmax(-1) for model in (target, student)])
        for place in range(1, 7):
            overlap = both[:, len(prompt) + place - 2].amin(0).sum().item()
            found[max(first for first in found if first <= place)].append(overlap)
    for first, overlaps in found.items():
        assert figures[f"acceptance_from_{first}"] == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-5)
    every = [overlap for overlaps in found.values() for overlap in overlaps]
    assert figures["acceptance"] == pytest.approx(sum(every) / len(every), abs=1e-5)
    assert figures["acceptance"] < 0.9


def test_a_target_may_have_eight_bits(folder):
    pytest.importorskip("bitsandbytes")
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    of = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_new_tokens": 8}
    of |= {"eval_prompts": f"{folder}/prompts.jsonl"}
    short = distill(arguments(folder, "eight", target_quantization=eight, **of))
    assert "Linear8bitLt" in repr(short.target)
    assert losses(short) == pytest.approx(losses(distill(arguments(folder, "whole", **of))), rel=0.05)


WRONG = {
    "an unknown loss": ({"losses": {"foward_kl": 1.0}}, "forward_kl"),
    "a share above one": ({"on_policy": 1.5}, "from 0 to 1"),
    "no texts": ({"dataset": "{folder}/nothing.jsonl"}, "nothing.jsonl"),
    "no student": ({"student": "out/nowhere"}, "student='out/nowhere' is neither a folder nor a Hub id within reach"),
    "no base": (
        {"student": "out/nowhere", "peft": {"r": 2}},
        "student='out/nowhere' is neither a folder nor a Hub id within reach",
    ),
    "two starts": ({"init": {"config": {}}}, "student and init given; choose one"),
    "an unwritable folder": ({"output_dir": "/proc/nowhere"}, "/proc/nowhere"),
    "a context too long": ({"max_length": 1000}, "1000"),
    "on-policy without room": ({"on_policy": 0.5, "on_policy_prompt": 48}, "leaves nothing to write"),
    "no prompts asked for": ({"eval_limit": 0}, "eval_limit=0 must be a whole number of at least 1"),
    "texts of nothing to learn": ({"max_length": 1}, "max_length=1 must be a whole number of at least 2"),
    "half a step": ({"max_steps": 2.5}, "max_steps=2.5 must be a whole number"),
    "no texts asked for": ({"dataset_limit": 0}, "dataset_limit=0"),
    "another tokenizer": ({"student": "{root}/models/smol-drafter"}, "tokenizer"),
    "evaluation of nothing": ({"eval_strategy": "steps", "eval_steps": 2}, "eval_prompts=FILE"),
    "figures before training of nothing": ({"eval_on_start": True}, "eval_prompts=FILE"),
    "logits of another target": ({"target_cache": "{folder}/logits"}, "of the target other/model, not of .*/target"),
    "logits of nothing": ({"target_cache": "{folder}/texts.jsonl"}, "holds no cached logits"),
    "a target shared with no other process": ({"target_sharded": True}, "no other process could share the weights"),
    "a target shared and on one device": ({"target_sharded": True, "target_device_map": "auto"}, "leave out"),
    "Muon on parts": ({"muon": True, "fsdp": True}, "which FSDP splits"),
    "no checkpoint": ({"resume_from_checkpoint": "{folder}/texts.jsonl"}, "no whole .* Name a folder checkpoint-N,"),
    "no number": ({"learning_rate": "fast"}, "learning_rate='fast' must be a number, such as learning_rate=2e-5"),
    "no steps": ({"max_steps": 0}, "max_steps=0 leaves nothing to train: give at least 1"),
    "no epochs": ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 leaves nothing to train"),
    "an order that is not followed": ({"train_sampling_strategy": "group_by_length"}, "in random order; leave them"),
    "rows to drop that are not": ({"dataloader_drop_last": True}, "every row is read once an epoch"),
    "smoothed labels": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the losses .* do not read it"),
    "no figure": (
        {"metric_for_best_model": "loss"},
        "metric_for_best_model='loss' is not a figure .* accepted_1 to accepted_5",
    ),
    "no rows a step": (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size=0 must be a whole number of at least 1",
    ),
    "no batches a step": (
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps=0 must be a whole number of at least 1",
    ),
    "a null as data": ({"dataset": None}, "dataset=None is a NoneType; it takes str"),
    "nothing as data": ({"dataset": ""}, "'' is no data set; give a Hub id"),
    "a number as prompts": ({"eval_prompts": 5}, "eval_prompts=5 is an int; it takes str or NoneType"),
    "a null as number": ({"weight_decay": None}, "weight_decay=None is a NoneType; it takes float"),
    "a number as truth value": ({"packing": 5}, "packing=5 is an int; it takes bool"),
    "no dtype": ({"target_dtype": "floaty"}, "target_dtype='floaty' must be auto or a dtype of torch"),
    "a word as rank": ({"peft": {"r": "x"}}, "peft.r='x' is a str; it takes int"),
    "no rank": ({"peft": {"r": 0}}, "peft.r=0 is a rank: give at least 1"),
    "no truth value": ({"packing": "perhaps"}, "packing='perhaps' must be true or false, such as packing=true"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_found_before_the_target_is_loaded(folder, what, monkeypatch):
    monkeypatch.setattr(run, "load_models", lambda *_: pytest.fail("the target was loaded"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)  # deepspeed's absence is another mistake
    changes, words = WRONG[what]
    if "target_cache" in changes and not (folder / "logits").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / "target")
        rows = read_rows(str(folder / "texts.jsonl"), tokenizer, 48)
        target = AutoModelForCausalLM.from_pretrained(folder / "target")
        TargetCache.write(lambda: target, rows, folder / "logits", {"target": "other/model", "k": 4})
    changes = {
        key: value.format(folder=folder, root=ROOT) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(ValueError, match=words):
        distill(arguments(folder, "wrong", **changes))


@pytest.mark.parametrize("noted", [True, False])
def test_a_checkpoint_of_another_student_is_refused(folder, noted, monkeypatch):
    """Before the target is loaded, if the student has another name; else by its weights."""
    distill(arguments(folder, f"other-{noted}", max_steps=2))
    (note,) = (folder / f"other-{noted}").glob("checkpoint-*/run.json")
    if noted:
        monkeypatch.setattr(run, "load_models", lambda *_: pytest.fail("the target was loaded"))
    else:
        note.write_text(note.read_text().replace('"student": "student"', '"student": "target"'))
    with pytest.raises(ValueError, match="holds a run with student='student'" if noted else "holds another student"):
        distill(arguments(folder, f"other-{noted}", max_steps=4, student=str(folder / "target")))


@pytest.mark.slow
def test_a_run_that_was_moved_continues_with_its_student(folder, tmp_path):
    distill(arguments(folder, "moved", max_steps=2))
    for name in ("student", "moved"):
        shutil.copytree(folder / name, tmp_path / name)
    trainer = distill(arguments(folder, str(tmp_path / "moved"), max_steps=3, student=str(tmp_path / "student")))
    assert len(losses(trainer)) == 3


@pytest.mark.slow
def test_a_checkpoint_is_chosen(folder):
    """By its folder, or none."""
    whole = distill(arguments(folder, "chosen", max_steps=4))
    shutil.rmtree(folder / "chosen/checkpoint-4")
    first = str(folder / "chosen/checkpoint-2")
    elsewhere = distill(arguments(folder, "elsewhere", max_steps=4, resume_from_checkpoint=first))
    assert losses(elsewhere) == losses(whole)
    again = distill(arguments(folder, "chosen", max_steps=1, resume_from_checkpoint=False))
    assert losses(again) == losses(whole)[:1]


def test_without_deepspeed_the_message_says_what_to_install(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "deepspeed" else found(n, *rest))
    with pytest.raises(ValueError, match=r"pip install csdraft\[deepspeed\]"):
        arguments(folder, "wrong", deepspeed={"zero_optimization": {"stage": 2}})


def test_a_trained_student_is_not_called_what_it_was(folder, monkeypatch):
    """A cascade saved by ids would else name the student as it was before."""
    student, target = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "target"))
    student.config.name_or_path, student.config._commit_hash = "me/small", "0" * 40
    DrafterTrainer(student, arguments(folder, "called"), target=target)
    csdraft.CascadeDrafter([student]).save_pretrained(folder / "called/cascade", copy_models=False)
    document = json.loads((folder / "called/cascade/cascade.json").read_text())
    assert document["models"] == {"called": {"folder": "models/called"}}


def test_an_encoder_decoder_needs_prompts_before_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(run, "load_models", lambda *_: pytest.fail("the target was loaded"))
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5Config(vocab_size=300, **shape).save_pretrained(folder / "t5")
    AutoTokenizer.from_pretrained(folder / "target").save_pretrained(folder / "t5")
    short = {"on_policy": 0.5, "on_policy_prompt": 99}  # which an encoder-decoder does not use
    with pytest.raises(ValueError, match=r"row 0 has a prompt of 0 tokens.*'prompt' and 'response'"):
        distill(arguments(folder, "plain", target=str(folder / "t5"), student=None, init={"config": {}}, **short))
    cached = {"target": str(folder / "t5"), "target_cache": str(folder / "logits")}
    with pytest.raises(ValueError, match="target_cache is for decoder-only targets; leave it out"):
        distill(arguments(folder, "plain", student=None, init={"config": {}}, **cached))


def test_words_of_yaml_mean_what_the_default_says():
    given = {
        "report_to": False,
        "eval_strategy": False,
        "learning_rate": "3e-4",
        "max_steps": "1e3",
        "logging_steps": 5,
    }
    args = make_arguments(DistillArguments, {"use_cpu": True, "output_dir": "nowhere", **given})
    assert (args.report_to, args.eval_strategy.value) == ([], "no")
    assert (args.learning_rate, args.max_steps, args.logging_steps) == (3e-4, 1000, 5)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_follows_a_figure_wants_it_higher(folder, kind):
    """transformers would lower the rate when the figure rises."""
    given = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(folder, kind, **given, lr_scheduler_kwargs={"patience": 0})
    assert args.metric_for_best_model == "block_efficiency"
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = transformers.get_scheduler(kind, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    assert (made.mode, made.patience) == ("max", 0)


def test_the_best_checkpoint_is_none_without_evaluations(folder):
    with pytest.raises(ValueError, match="save_strategy='best' without evaluations saves nothing: give eval_strategy"):
        arguments(folder, "best", save_strategy="best")


@pytest.mark.slow
def test_the_start_counts_when_the_best_is_kept(folder, capsys):
    """A rate that ruins the student: no later evaluation is better than the first."""
    run_of = {
        "max_steps": 4, "learning_rate": 3.0, "eval_strategy": "steps", "eval_steps": 2, "eval_new_tokens": 12,
        "eval_prompts": f"{folder}/prompts.jsonl", "eval_on_start": True, "load_best_model_at_end": True,
        "save_total_limit": 1, "metric_for_best_model": "acceptance",
    }  # fmt: skip
    trainer = distill(arguments(folder, "ruined", **run_of))
    figures = [entry["eval_acceptance"] for entry in trainer.state.log_history if "eval_prompts" in entry]
    assert figures[0] > max(figures[1:])
    assert trainer.state.best_global_step == 0
    assert "no evaluation was better than the one at the start (acceptance" in capsys.readouterr().out
    assert largest_difference(weights(folder / "ruined"), weights(folder / "student")) == 0
    card = (folder / "ruined/README.md").read_text()
    before, after = re.search(r"\| expected acceptance.* \| (.*) \| (.*) \|", card).groups()
    assert before == after
    assert "so these are the weights of the start" in " ".join(card.split())
    assert "base_model" not in card, "a folder is no id of the Hub"

    for checkpoint in (folder / "ruined").glob("checkpoint-[24]"):
        shutil.rmtree(checkpoint)
    (folder / "ruined/finished.json").unlink()
    again = distill(arguments(folder, "ruined", **run_of))
    assert losses(again) == losses(trainer), "what is left is no place to resume from"


@pytest.mark.slow
def test_the_best_is_found_where_a_run_was_moved(folder, tmp_path):
    run_of = {
        "eval_strategy": "steps", "eval_steps": 2, "eval_new_tokens": 12, "eval_prompts": f"{folder}/prompts.jsonl",
        "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = distill(arguments(folder, "stays", max_steps=4, **run_of))
    assert trainer.state.best_global_step is not None
    (folder / "stays").rename(tmp_path / "moved")
    moved = distill(arguments(folder, str(tmp_path / "moved"), max_steps=6, **run_of))
    assert Path(moved.state.best_model_checkpoint).parent == tmp_path / "moved"
    other = distill(arguments(folder, str(tmp_path / "moved"), max_steps=8, **run_of | {"eval_new_tokens": 6}))
    assert other.state.best_global_step == 8, "figures of another evaluation are not compared"


@pytest.mark.parametrize(
    ("made", "rate"),
    [
        ({}, 2e-5),
        ({"student": None, "init": {"from_target": {"layers": [0]}}}, 1e-4),
        ({"student": None, "init": {"config": {}}}, 3e-4),
        ({"peft": {"r": 2}}, 2e-4),
        ({"student": None, "init": on_target([0]), "peft": {"r": 2}}, 4e-4),
        ({"learning_rate": 0.5}, 0.5),
    ],
)
def test_each_kind_of_student_has_a_learning_rate(folder, made, rate):
    given = {"learning_rate": None} | made
    assert arguments(folder, "rates", **given).learning_rate == rate
