"""`DrafterTrainer` called in Python, with what users of `transformers.Trainer` give it: it works, or says why not."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from csdraft.trainers.distill import DrafterTrainer
from csdraft.trainers.evaluation import Evaluation
from csdraft.trainers.muon import MuonAdamW
from csdraft.trainers.publish import provenance
from csdraft.trainers.run import prepare
from csdraft.trainers.stops import NonFinite
from tests.tiny import fresh, tiny
from tests.trainers.pair import arguments, make_pair

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("plain"))


def made(folder: Path, name: str, changes: dict | None = None, **options: Any) -> DrafterTrainer:
    """A trainer with a fresh pair; options that are ... are left out."""
    args = arguments(folder, name, save_strategy="no", **(changes or {}))
    student, target = (AutoModelForCausalLM.from_pretrained(folder / model) for model in ("student", "target"))
    _, tokenizer, batches = prepare(args)
    given = {"model": student, "target": target, "processing_class": tokenizer, **batches, **options}
    return DrafterTrainer(args=args, **{key: value for key, value in given.items() if value is not ...})


def losses(trainer: DrafterTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [True, False])
def test_without_a_collator_batches_are_the_same(folder, packing):
    """The collator of transformers would add an attention mask, with which packed texts see each other."""
    usual = made(folder, f"collated-{packing}", {"packing": packing})
    without = made(folder, f"not-collated-{packing}", {"packing": packing}, data_collator=...)
    assert losses(without) == losses(usual)


def test_other_prompts_can_be_evaluated(folder):
    trainer, other = made(folder, "others", eval_dataset=PROMPTS), [[20, 21, 22, 23]]
    alone = made(folder, "alone", eval_dataset=other).evaluate()
    assert trainer.evaluate(eval_dataset=other) == alone
    assert trainer.evaluate()["eval_prompts"] == 2
    assert "test_acceptance" in trainer.evaluate(other, metric_key_prefix="test")


def test_prompts_longer_than_the_students_context_are_decoded_and_not_compared():
    """A student with learned positions cannot read on; the decoding drafts no further there either."""
    target, student = tiny("gpt2"), fresh("gpt2", max_position_embeddings=16)
    short, long = [[5, 6, 7]], [list(range(5, 25))]
    figures = []
    for prompts in (short, short + long, long):
        evaluation = Evaluation(prompts, 0, new_tokens=4)
        figures.append(evaluation.grade(evaluation.run(target, student)))
    assert figures[0]["acceptance"] == pytest.approx(figures[1]["acceptance"], rel=1e-5)
    assert figures[0]["agreement"] == figures[1]["agreement"]
    assert math.isnan(figures[2]["acceptance"])
    assert math.isnan(figures[2]["agreement"])
    assert figures[2]["block_efficiency"] == 1


def test_figures_that_could_not_be_measured_are_not_published(folder):
    trainer = made(folder, "unmeasured")
    trainer.state.log_history.append({"eval_block_efficiency": 1.0, "eval_acceptance": math.nan, "step": 4})
    assert provenance(trainer)["measured"] == {"eval_block_efficiency": 1.0, "step": 4}


def test_vocabularies_may_be_padded_differently(folder, tmp_path):
    """On-policy, a wider student wrote tokens that the target lacks; a narrower one was evaluated on what it lacks."""
    own, names = AutoTokenizer.from_pretrained(folder / "student"), ("student", "target")
    for name in names:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / name)
        model.resize_token_embeddings(len(own) + 100, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[len(own) :] = 10 * model.lm_head.weight[:100]  # likelier than all others
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    trainer = made(
        folder, "wide-student", {"on_policy": 1.0}, model=AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    )
    assert all(map(math.isfinite, losses(trainer)))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert made(folder, "wide-target", target=wide, eval_dataset=PROMPTS).evaluate()["eval_prompts"] == 2
    evaluation = Evaluation(PROMPTS, 0, new_tokens=8)
    narrow = AutoModelForCausalLM.from_pretrained(folder / "target")
    figures = evaluation.grade(evaluation.run(wide, narrow))
    assert figures["agreement"] < 0.5, "what the student lacks is never kept"
    assert figures["acceptance"] < 0.5


def test_predict_says_what_to_call(folder):
    with pytest.raises(ValueError, match=r"predicts no labels; evaluate\(\) gives its figures"):
        made(folder, "predict").predict(PROMPTS)


def test_muon_trains_the_student(folder):
    trainer = made(folder, "muon", {"muon": True, "max_steps": 1})
    assert losses(trainer)
    assert type(trainer.optimizer.optimizer) is MuonAdamW


def test_an_evaluation_alone_is_enough(folder):
    args, evaluation = {"eval_steps": 2, "max_steps": 2, "eval_new_tokens": 4}, Evaluation(PROMPTS, 0, new_tokens=4)
    trainer = made(folder, "evaluation", args, evaluation=evaluation)
    trainer.args.eval_strategy = "steps"
    again = DrafterTrainer(trainer.model, trainer.args, target=trainer.target, evaluation=evaluation)
    assert again.evaluate()["eval_prompts"] == 2


REFUSED = {
    "several sets of prompts": ({"eval_dataset": {"a": PROMPTS}}, "eval_dataset=dict .* takes further sets"),
    "a data set as prompts": ({"eval_dataset": Dataset.from_dict({"input_ids": PROMPTS})}, "eval_dataset=Dataset"),
    "texts as prompts": ({"eval_dataset": ["import os"]}, "lists of token ids"),
    "no prompts": ({"eval_dataset": []}, "one prompt or more"),
    "an empty prompt": ({"eval_dataset": [[], [1]]}, "none empty"),
    "a data set to train on": (
        {"train_dataset": Dataset.from_dict({"text": ["a b"]})},
        "train_dataset=Dataset: give Texts",
    ),
    "a stream to train on": (
        {"train_dataset": Dataset.from_dict({"text": ["a b"]}).to_iterable_dataset()},
        "train_dataset=IterableDataset",
    ),
    "tokens that a model lacks": (
        {"model": fresh("llama", vocab_size=99)},
        r"The student has a vocabulary of 99, and row \d+ has token 259",
    ),
    "figures that are not computed": ({"compute_metrics": lambda prediction: {}}, "compute_metrics= has no effect"),
    "a loss that is not used": ({"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func= has no effect"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_a_step(folder, what):
    options, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        made(folder, "refused", **options)


def test_without_a_tokenizer_texts_are_written_and_prompts_evaluated(folder):
    """Only padding would be taken from it, which no model sees."""
    changes = {"on_policy": 0.5, "max_steps": 2, "eval_new_tokens": 4}
    usual = made(folder, "usual", changes, eval_dataset=PROMPTS)
    without = made(folder, "no-tokenizer", changes, eval_dataset=PROMPTS, processing_class=...)
    assert losses(without) == losses(usual)
    assert without.evaluate() == usual.evaluate()


def test_packing_is_refused_where_texts_would_see_each_other(folder):
    with pytest.raises(ValueError, match="OPTForCausalLM does not keep texts apart"):
        made(folder, "mixing", {"packing": True}, target=tiny("opt"))
    training = made(folder, "apart", {"packing": True}, model=fresh("llama", vocab_size=260).train()).model
    assert training.training, "the check leaves the student as it was given"
    training.eval()


def test_a_loss_that_is_not_finite_is_told_without_a_tokenizer_and_of_any_items(folder):
    """Its message quotes what rows begin with, where that is known."""
    usual = made(folder, "items")
    items = [usual.train_dataset[i] for i in range(16)]
    for name, options in {"nameless": {}, "listed": {"train_dataset": items}}.items():
        trainer = made(folder, name, **options, processing_class=...)
        with torch.no_grad():
            trainer.student.get_input_embeddings().weight.fill_(torch.nan)
        with pytest.raises(NonFinite, match="the loss is nan with rows"):
            trainer.train()


def test_a_tokenizer_with_neither_padding_nor_end_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    tokenizer.pad_token = tokenizer.eos_token = None
    trainer = made(folder, "endless", {"eval_new_tokens": 4}, eval_dataset=PROMPTS, processing_class=tokenizer)
    assert trainer.evaluate()["eval_prompts"] == 2


def test_a_padding_token_may_be_beyond_the_models_vocabulary(folder, tmp_path):
    """As where one was added to the tokenizer and the model stayed as it was."""
    for name in ("target", "student"):
        shutil.copytree(folder / name, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(tmp_path / name)
    places = {name: str(tmp_path / name) for name in ("target", "student")}
    trainer = made(folder, "unpadded", places | {"on_policy": 0.5, "eval_new_tokens": 4}, eval_dataset=PROMPTS)
    assert all(map(math.isfinite, losses(trainer)))
    assert trainer.evaluate()["eval_prompts"] == 2


def test_a_tokenizer_written_in_python_is_saved(folder, tmp_path):
    """Such as ByT5's, which has no tokenizer.json."""
    trainer = made(folder, "python", processing_class=ByT5Tokenizer())
    trainer.save_model(str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path)("né")["input_ids"] == ByT5Tokenizer()("né")["input_ids"]
