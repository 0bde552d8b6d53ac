"""The pretraining script: learns, survives a kill, and refuses keys it does not know."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from csdraft.data.text import read_corpus, split
from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.checkpoints import last_checkpoint
from csdraft.trainers.command import one_line_errors
from csdraft.trainers.stops import NonFinite
from recipes.smol.pretrain import Blocks, PretrainArguments, pretrain
from recipes.smol.train_tokenizer import TokenizerArguments, train_tokenizer
from tests.forked import Forked

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes/smol/pretrain.py"
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "block_size": 32, "eval_blocks": 2, "threads": 1,
    "per_device_train_batch_size": 4, "learning_rate": 0.02, "muon": True, "lr_scheduler_type": "constant",
    "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_steps": 5, "save_total_limit": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, its tokenizer and a recipe."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "corpus").mkdir()
    for i in range(60):
        text = "".join(f"def add_{j}(left, right):\n    return left + right + {i * j}\n\n" for j in range(8))
        (folder / "corpus" / f"module_{i}.py").write_text(text)
    corpus, tokenizer = str(folder / "corpus"), str(folder / "tokenizer")
    train_tokenizer(TokenizerArguments(corpus=corpus, vocab_size=300, output_dir=tokenizer))
    recipe = TINY | {"corpus": corpus, "tokenizer": tokenizer}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--config", f"{folder}/tiny.yaml", f"output_dir={folder}/{name}", *overrides]


def offline() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def train(folder: Path, name: str, **overrides):
    pairs = [f"{key}={value}" for key, value in overrides.items()] + [f"output_dir={folder}/{name}"]
    return pretrain(read_arguments(PretrainArguments, f"{folder}/tiny.yaml", pairs))


def test_loss_falls_and_the_result_loads(folder):
    history = train(folder, "model", max_steps=30).state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    prompt = tokenizer("def add_1(", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 4


def test_a_killed_run_continues_as_if_nothing_had_happened(folder):
    process = Forked(command(folder, "killed", "max_steps=100000")[1:])
    deadline = time.monotonic() + 120
    while not (checkpoint := last_checkpoint(f"{folder}/killed")):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline, "the script left no checkpoint"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = int(last_checkpoint(f"{folder}/killed").rpartition("-")[2])
    assert stopped >= int(checkpoint.rpartition("-")[2]) >= 5

    resumed = train(folder, "killed", max_steps=stopped + 5)
    steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert steps == list(range(1, stopped + 6))
    train(folder, "straight", max_steps=stopped + 5)
    killed, straight = (load_file(folder / name / "model.safetensors") for name in ("killed", "straight"))
    assert all(torch.equal(killed[name], straight[name]) for name in straight)


def test_a_second_stage_continues_from_the_first(folder):
    train(folder, "first", max_steps=20)
    second = train(folder, "second", max_steps=2, model=folder / "first", block_size=64, learning_rate=0.0)
    first = json.loads((folder / "first/eval_results.json").read_text())["eval_loss"]
    assert abs(second.state.log_history[0]["loss"] - first) < 0.5
    assert second.train_dataset[0]["input_ids"].shape == (64,)


def test_unknown_key_names_the_nearest(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(folder, "typo", "learning_rat=0.1")[1:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code
    assert "unknown key 'learning_rat'" in said
    assert "learning_rate" in said


def test_override_without_value(folder):
    with pytest.raises(ValueError, match="not of the form key=value"):
        read_arguments(PretrainArguments, f"{folder}/tiny.yaml", ["max_steps"])


def test_exponents_without_a_point_are_numbers(folder):
    given = ["learning_rate=3e-4", "lr_scheduler_kwargs={min_lr: 1e-5}", f"output_dir={folder}"]
    args = read_arguments(PretrainArguments, None, given)
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (3e-4, {"min_lr": 1e-5})


def test_split_depends_on_names_only(folder):
    documents = read_corpus(str(folder / "corpus"))
    train_part, held_out = split(documents)
    assert held_out
    assert len(train_part) + len(held_out) == len(documents)
    assert split(document._replace(text="x") for document in documents[::2])[1] == [
        document._replace(text="x") for document in documents[::2] if document in held_out
    ]


def test_missing_corpus_and_small_corpus(folder):
    with pytest.raises(ValueError, match="neither 'stdlib' nor a file or folder"):
        read_corpus("no/such/place")
    with pytest.raises(ValueError, match="smaller block_size"):
        Blocks(read_corpus(str(folder / "corpus"))[:1], AutoTokenizer.from_pretrained(folder / "tokenizer"), 4096)


TEXTS = ["", "a\t\r\n\n b ", "naïve 漢字 🙂\x00", "x = 1234567", "a<|endoftext|>b", " 't , ."]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0
    assert ids.count(0) == text.count("<|endoftext|>")


def test_digits_are_single_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer("2026")["input_ids"]) == 4


def test_a_finished_run_is_left_alone_and_other_options_are_refused(folder, capsys):
    train(folder, "done", max_steps=6)
    files = {path: path.read_bytes() for path in (folder / "done").rglob("*") if path.is_file()}
    again = train(folder, "done", max_steps=6)
    assert "holds the result of all 6 steps; nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (folder / "done").rglob("*") if path.is_file()} == files
    stored = load_file(folder / "done/model.safetensors")
    assert all(torch.equal(stored[name].float(), again.model.state_dict()[name]) for name in stored)
    for change, words in (
        ({"learning_rate": 0.5}, "learning_rate=0.02, now it is 0.5"),
        ({"block_size": 16}, "block_size=32, now it is 16"),
        ({"hidden_size": 32}, "hidden_size=16, now it is 32"),
    ):
        with pytest.raises(ValueError, match=words):
            train(folder, "done", max_steps=7, **change)
    assert train(folder, "done", max_steps=7).state.global_step == 7


def test_a_loss_of_nan_stops_the_run(folder):
    """Of a start whose weights are broken."""
    train(folder, "start", max_steps=1)
    weights = load_file(folder / "start/model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "start/model.safetensors", {"format": "pt"})
    with pytest.raises(NonFinite, match=r"step 1: the loss is nan with rows \d.* The model has weights .*model\.norm"):
        train(folder, "broken", max_steps=3, model=folder / "start")
    assert not list((folder / "broken").rglob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_read_what_one_reads_and_resume_in_any_epoch(folder):
    """Losses over one epoch and a half; after a stop in the second they are the same to the bit."""
    rows, cut = {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    common = {"muon": "false", "save_steps": 1, "save_total_limit": "null", "learning_rate": 0.002}
    alone = train(folder, "one", max_steps=20, **rows, **common)
    per_epoch = round(alone.state.global_step / alone.state.epoch)
    steps, stop = per_epoch + per_epoch // 2, per_epoch + 2
    alone = losses(train(folder, "one", max_steps=steps, **rows, **common).state.log_history)

    def shared(name: str) -> list[float]:
        words = command(folder, name, *(f"{k}={v}" for k, v in {"max_steps": steps, **common, **cut}.items()))[1:]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*launcher, *words], env=offline(), check=True, timeout=400)
        state = json.loads((folder / name / f"checkpoint-{steps}/trainer_state.json").read_text())
        return losses(state["log_history"])

    two = shared("two")
    assert two == pytest.approx(alone, rel=1e-3)
    for checkpoint in (folder / "two").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > stop:
            shutil.rmtree(checkpoint)
    assert shared("two") == two


def losses(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def test_errors_that_the_script_raises_itself_are_one_line_too(capsys):
    with pytest.raises(SystemExit, match="1"), one_line_errors("", pretrain.__module__):
        Blocks([], None, 8)
    assert "0 tokens in 0 documents do not fill one block of 8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="do not fill"), one_line_errors(""):
        Blocks([], None, 8)
