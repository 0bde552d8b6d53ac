"""One chat format in every place that reads conversations: data writing, training, evaluation, the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

import csdraft_command
from csdraft import MaxGram
from csdraft.cli import _models, main
from csdraft.data.generate import GenerateArguments, generate, read_starts
from csdraft.data.packing import Filled
from csdraft.data.target_cache import CacheArguments, cache_logits
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.publish import described_data
from csdraft.trainers.run import make_evaluation, prepare
from tests.data.words import CALLING, PLAIN, WORDS, make_tokenizer, write_lines
from tests.tiny import fresh, tiny

TOOLS = [{"type": "function", "function": {"name": "w20"}}]
QUESTION = {"role": "user", "content": "w2 w3"}
ROWS = [
    {"messages": [QUESTION, {"role": "assistant", "content": "w4"}]},
    {"messages": None},
    {"messages": [QUESTION, {"role": "assistant", "content": "w4 " * 40}]},
]
OPTIONS = {"enable_thinking": False, "tools": TOOLS}
PROMPT = "w20 <user> w2 w3 </s> <assistant> w0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    fresh("llama").save_pretrained(folder / "target")
    make_tokenizer(CALLING).save_pretrained(folder / "target")
    write_lines(folder / "chats.jsonl", ROWS)
    write_lines(folder / "plain.jsonl", [{"prompt": "w2 w3"}])
    return folder


def words(ids) -> str:
    return " ".join(WORDS[token] for token in ids)


def writing(folder: Path, name: str, **changes: object) -> GenerateArguments:
    settings = {"chat_template_options": OPTIONS, "max_new_tokens": 4, "threads": 1} | changes
    return GenerateArguments(
        target=str(folder / "target"), dataset=str(folder / "chats.jsonl"), output_dir=str(folder / name), **settings
    )


def distilling(folder: Path, **changes: object) -> DistillArguments:
    settings: dict = {"dataset": str(folder / "chats.jsonl"), "chat_template_options": OPTIONS, "max_length": 32}
    return DistillArguments(
        target=str(folder / "target"),
        student=str(folder / "target"),
        output_dir=str(folder / "drafter"),
        eval_prompts=str(folder / "chats.jsonl"),
        use_cpu=True,
        report_to="none",
        **(settings | changes),
    )


def test_every_reader_gives_the_same_prompt(folder):
    config, tokenizer = (auto.from_pretrained(folder / "target") for auto in (AutoConfig, AutoTokenizer))
    written = read_starts(writing(folder, "starts"), config, tokenizer)
    evaluation = make_evaluation(distilling(folder), config, tokenizer)
    assert evaluation is not None
    parser = argparse.ArgumentParser()
    csdraft_command.add_chat_arguments(parser)
    args = parser.parse_args(["--chat", "--chat-template-options", json.dumps(OPTIONS)])
    args.max_new_tokens = 1
    opened = _models.Opened(tiny("llama"), tokenizer, None, {})
    asked = _models.encode(opened, "w2 w3", 1, _models.chat_of_text(args))["input_ids"].tolist()
    plain, chats = (
        _models.prompts_of_file(opened, str(folder / f"{name}.jsonl"), args) for name in ("plain", "chats")
    )
    for prompts in (written, evaluation.prompts, asked, plain, chats):
        assert {words(prompt) for prompt in prompts} == {PROMPT}
    _, _, batches = prepare(distilling(folder))
    labels = batches["train_dataset"].rows
    assert [words(row["input_ids"][: row["prompt_length"]]) for row in labels] == [PROMPT.removesuffix(" w0")] * 2


def test_counts_are_in_the_provenance_of_data_and_drafters(folder, capsys):
    generate(writing(folder, "counted"), MaxGram())
    assert "3 rows read; 1 left out (1 has a null conversation, row 1)" in capsys.readouterr().err
    noted = json.loads((folder / "counted/arguments.json").read_text())
    assert noted["data"] == {"read": 3, "left_out": {"a null conversation": 1}, "cut": 0}
    args = distilling(folder)
    _, _, batches = prepare(args)
    described = described_data(SimpleNamespace(train_dataset=Filled(batches["train_dataset"]), args=args, noted={}))
    assert {name: described[name] for name in ("rows", "read", "left_out", "cut")} == {
        "rows": 2, "read": 3, "left_out": {"a null conversation": 1}, "cut": 1
    }  # fmt: skip
    assert "1 cut to 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["chat_template_options", "chat_template"])
def test_data_written_with_another_template_is_not_gone_on_with(folder, changed, monkeypatch):
    rows = generate(writing(folder, f"of-{changed}"), MaxGram())
    assert [words(row["input_ids"][: row["prompt_length"]]) for row in rows] == [PROMPT] * 2
    monkeypatch.setattr(GenerateArguments, "load_target", None)
    other = {"chat_template_options": {"enable_thinking": True}, "chat_template": CALLING + " "}
    with pytest.raises(ValueError, match=f"holds rows of {changed}="):
        generate(writing(folder, f"of-{changed}", **{changed: other[changed]}), MaxGram())


def test_data_of_before_there_were_templates_is_gone_on_with(folder):
    """Their arguments.json names none."""
    first = generate(writing(folder, "old", chat_template_options=None), MaxGram())
    path = folder / "old/arguments.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in noted.items() if "chat" not in key and key != "data"}))
    assert (
        generate(writing(folder, "old", chat_template_options=None), MaxGram())["input_ids"][:]
        == first["input_ids"][:]
    )


def test_cached_logits_are_of_the_same_rows(folder):
    """Rows of other options have another checksum: training refuses the cache."""
    settings = {"target": str(folder / "target"), "dataset": str(folder / "chats.jsonl"), "max_length": 32, "k": 4}
    cache_logits(CacheArguments(**settings, output_dir=str(folder / "cache"), chat_template_options=OPTIONS))
    prepare(distilling(folder, target_cache=str(folder / "cache")))
    with pytest.raises(ValueError, match="are of other texts"):
        prepare(distilling(folder, target_cache=str(folder / "cache"), chat_template_options=None))


@pytest.mark.parametrize("arguments", [distilling, lambda folder, **changes: writing(folder, "bad", **changes)])
def test_what_is_no_template_is_refused_with_the_arguments(folder, arguments):
    for changes in ({"chat_template": "missing.jinja"}, {"chat_template_options": {"tokenize": True}}):
        with pytest.raises(ValueError, match="chat_template"):
            arguments(folder, **changes)


def test_generate_tune_and_check_read_chats(folder, capsys):
    target = ["--target", str(folder / "target")]
    options = ["--chat-template-options", json.dumps(OPTIONS)]
    assert main(["generate", *target, "--prompt", PROMPT, "--max-new-tokens", "6"]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", *target, "--prompt", "w2 w3", "--chat", *options, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == wanted
    (folder / "own.jinja").write_text(PLAIN)
    own = ["--chat", "--chat-template", str(folder / "own.jinja")]
    assert main(["generate", *target, "--prompt", "w2 w3", *own, "--max-new-tokens", "6"]) == 0
    assert main(["generate", *target, "--prompt", "w2", *options]) == 2
    assert "have no effect on text without --chat" in capsys.readouterr().err
    assert main(["generate", *target, "--prompt", "w2", "--chat", "--chat-template-options", '{"thinking": 1}']) == 2
    assert "has thinking, which the chat template does not read" in capsys.readouterr().err
    drafting = [*target, "--drafter", "max_gram", "--prompts", str(folder / "chats.jsonl"), *options]
    assert main(["check", *drafting, "--max-new-tokens", "6", "--samples", "0"]) == 0
    said = capsys.readouterr()
    assert said.out.count("PASS") == 2
    assert "1 left out (1 has a null conversation, row 1)" in said.err
    few = ["--max-new-tokens", "6", "--finalists", "1", "--repetitions", "1", "--tree-nodes"]
    assert main(["tune", *drafting, *few]) == 0
    assert "chosen:" in capsys.readouterr().out
