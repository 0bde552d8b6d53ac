"""What a target writes: its own text, the same however the work is shared and interrupted, no row lost or repeated."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from csdraft import MaxGram, ModelDrafter
from csdraft.data import generate as module
from csdraft.data.generate import GenerateArguments, generate
from csdraft.data.shards import Part, Shard, batches, finished
from csdraft.data.sources import read_rows
from csdraft.data.text import read_corpus
from tests.data.words import make_target, make_tokenizer, sentence, write_lines
from tests.forked import Forked
from tests.tiny import EOS, fresh

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts/generate_data.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/`, `prompts.jsonl` of unequal lengths and `texts.jsonl`."""
    folder = tmp_path_factory.mktemp("generate")
    make_target(folder / "target")
    write_lines(folder / "prompts.jsonl", [{"prompt": sentence(2 + 5 * i % 17, i)} for i in range(40)])
    write_lines(folder / "texts.jsonl", [{"text": sentence(10 + i, i)} for i in range(200)])
    return folder


def settings(folder: Path, name: str, **changes: object) -> dict:
    return {
        "target": str(folder / "target"),
        "dataset": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / name),
        "max_new_tokens": 8,
        "batch_size": 4,
        "threads": 1,
    } | changes


def arguments(folder: Path, name: str, **changes: object) -> GenerateArguments:
    return GenerateArguments(**settings(folder, name, **changes))


def texts(rows: object) -> list[list[int]]:
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return [row["input_ids"] for row in rows]


@pytest.fixture(scope="module")
def written(folder) -> list[list[int]]:
    return texts(generate(arguments(folder, "written"), MaxGram()))


def test_greedy_rows_are_the_targets_and_sampled_ones_are_not(folder, written):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    prompts = read_rows(str(folder / "prompts.jsonl"), make_tokenizer(), 64)
    greedy = []
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt["input_ids"][:-1]])  # a row closes with the end of the text, a prompt does not
        alone = target.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
        greedy.append(text == alone)
        assert text[: ids.shape[1]] == ids[0].tolist()
        assert len(text) == ids.shape[1] + 8 or text.index(EOS, ids.shape[1]) == len(text) - 1
    assert greedy[::2] == [True] * 20
    assert sum(greedy[1::2]) < 10


def test_only_what_the_target_wrote_is_scored(folder, written):
    rows = read_rows(str(folder / "written"), make_tokenizer(), 64)
    prompts = read_rows(str(folder / "prompts.jsonl"), make_tokenizer(), 64)
    assert texts(rows) == written
    assert [row["prompt_length"] for row in rows] == [len(prompt["input_ids"]) - 1 for prompt in prompts]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_do_not_depend_on_processes_batches_and_drafter(folder, written, processes):
    drafter = ModelDrafter(fresh("llama", seed=1)) if processes > 1 else None
    name = f"parts-{processes}"
    for rank in range(processes):
        args = arguments(folder, name, rank=rank, world_size=processes, batch_size=3)
        rows = generate(args, drafter)
        assert (rows is None) == (rank < processes - 1)
    assert texts(rows) == written
    assert sorted(row["index"] for row, _ in finished(folder / name / "parts")) == list(range(40))


def test_a_row_has_the_noise_of_its_number_alone(folder, written):
    """A sampled row is what a call of that row alone gives with the row's number as seed."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    (row,) = [r for r in read_rows(str(folder / "written"), make_tokenizer(), 64) if r["index"] == 7]
    ids = torch.tensor([row["input_ids"][: row["prompt_length"]]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8}
    for assistant in (MaxGram(), None):
        assert target.generate(ids, assistant=assistant, row_seeds=[7], **options)[0].tolist() == written[7]


def test_another_seed_is_another_sample(folder, written):
    other = texts(generate(arguments(folder, "seed", seed=1), MaxGram()))
    assert [a == b for a, b in zip(other, written, strict=True)][::2] == [True] * 20
    assert other != written


def test_beginnings_come_from_the_texts(folder):
    changes = {"dataset": str(folder / "texts.jsonl"), "begin": 6, "count": 24, "text_file": str(folder / "out.txt")}
    rows = generate(arguments(folder, "begun", **changes), MaxGram())
    whole = [
        " ".join(map(str, row["input_ids"])) for row in read_rows(str(folder / "texts.jsonl"), make_tokenizer(), 512)
    ]
    for row in rows:
        start = " ".join(map(str, row["input_ids"][:6]))
        assert row["prompt_length"] == 6
        assert any(f" {start} " in f" {text} " for text in whole)
    tokenizer = make_tokenizer()
    decoded = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert [document.text.strip() for document in read_corpus(str(folder / "out.txt"))] == decoded


def test_more_rows_may_be_asked_for_later(folder, written):
    args = arguments(folder, "more", count=11)
    assert texts(generate(args, MaxGram())) == written[:11]
    assert texts(generate(arguments(folder, "more"), MaxGram())) == written


def test_nothing_is_loaded_when_nothing_is_missing(folder, written, monkeypatch):
    monkeypatch.setattr(GenerateArguments, "load_target", None)
    assert texts(generate(arguments(folder, "written"), MaxGram())) == written


def test_a_text_ends_before_a_token_that_the_tokenizer_lacks(folder, written):
    """A target's vocabulary may be padded; with such a token no row of the data could be read."""
    tokenizer = make_tokenizer()
    make_target(folder / "padded", vocab_size=2 * len(tokenizer))
    tokenizer.save_pretrained(folder / "padded")
    rows = generate(arguments(folder, "of-padded", target=str(folder / "padded")), MaxGram())
    found = texts(rows)
    assert max(map(max, found)) < len(tokenizer)
    assert len({len(ids) - row["prompt_length"] for ids, row in zip(found, rows, strict=True)}) > 2, "some are cut"
    assert read_rows(str(folder / "of-padded"), tokenizer, 64).num_rows > 10


def test_what_is_not_finished_is_not_read(folder):
    """Its files are of several kinds. Those of rows may be read."""
    assert generate(arguments(folder, "half", rank=0, world_size=2), MaxGram()) is None
    with pytest.raises(ValueError, match=r"half' is not finished: repeat the command .* or give .*half/parts"):
        read_rows(str(folder / "half"), make_tokenizer(), 64)
    assert 0 < len(read_rows(str(folder / "half/parts"), make_tokenizer(), 64)) < 40


def test_an_encoder_decoder_continues_its_source(folder):
    make_target(folder / "t5", "t5")
    rows = generate(arguments(folder, "seq2seq", target=str(folder / "t5"), count=6, sampled=0.0), MaxGram())
    target = fresh("t5")
    for row in rows:
        prompt, text = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        alone = target.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        assert text == alone


@pytest.mark.slow
def test_a_killed_run_goes_on_without_losing_or_repeating_a_row(folder):
    changes = {"dataset": str(folder / "texts.jsonl"), "begin": 8, "count": 100000}
    (folder / "killed.yaml").write_text(yaml.safe_dump(settings(folder, "killed", **changes)))
    process = Forked([str(SCRIPT), "--config", str(folder / "killed.yaml")])
    part = folder / "killed/parts/00000.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (part.exists() and part.read_bytes().count(b"\n") > 20):
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline, "the script wrote no rows"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = part.read_bytes()
    count = before.count(b"\n") + 30
    assert before[: before.rfind(b"\n")].count(b"\n") < count - 1
    part.write_bytes(before[:-5])  # killed in the middle of a line

    rows = generate(arguments(folder, "killed", **changes | {"count": count}), MaxGram())
    straight = generate(arguments(folder, "straight", **changes | {"count": count}), MaxGram())
    assert texts(rows) == texts(straight)
    after = part.read_bytes()
    whole = before[: before[:-5].rfind(b"\n") + 1]
    assert after.startswith(whole)
    indexes = [json.loads(line)["index"] for line in after.splitlines()]
    assert len(indexes) == len(set(indexes))


def test_a_file_may_end_at_any_byte(tmp_path):
    """Rows before the cut stay, what is after it is written again, nothing twice."""
    lines = [{"index": i, "prompt_length": 1, "input_ids": [i, 10 + i]} for i in range(3)]
    whole = tmp_path / "whole.jsonl"
    with Shard(whole) as shard:
        shard.append(lines)
    data = whole.read_bytes()
    for cut in range(len(data) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "0.jsonl").write_bytes(data[:cut])
        known = [row["index"] for row, _ in finished(folder)]
        assert known == list(range(data[:cut].count(b"\n")))
        with Shard(folder / "0.jsonl") as shard:
            shard.append(line for line in lines if line["index"] not in known)
        assert [place.read() for _, place in finished(folder)] == lines
        assert (folder / "0.jsonl").read_bytes() == data


def test_a_plan_has_every_row_once_and_keeps_its_beginning():
    lengths = [7 * i % 31 for i in range(1000)]
    kinds = [i % 3 == 0 for i in range(1000)]
    plan = batches(lengths, 4, kinds)
    assert sorted(row for rows in plan for row in rows) == list(range(1000))
    assert all(len({kinds[row] for row in rows}) == 1 and len(rows) <= 4 for rows in plan)
    assert sorted(rows for part in range(3) for rows in Part(part, 3).of(plan)) == sorted(plan)
    shorter = batches(lengths[:300], 4, kinds[:300])
    assert [rows for rows in shorter if max(rows) < 256] == plan[: sum(max(rows) < 256 for rows in shorter)]


def test_a_data_set_is_replaced_whole(tmp_path):
    """Data that `datasets` derived from the old one is not found again."""
    from csdraft.data.shards import store, stored

    with Shard(tmp_path / "parts/0.jsonl") as shard:
        shard.append({"index": i, "prompt_length": 0, "input_ids": [i]} for i in range(5))
    places = [place for _, place in finished(tmp_path / "parts")]
    first = store(tmp_path, places[:3]).map(lambda row: {"next": row["index"] + 1})
    second = store(tmp_path, places[::-1]).map(lambda row: {"next": row["index"] + 1})
    assert (len(first), stored(tmp_path)) == (3, 5)
    assert second["next"][:] == [5, 4, 3, 2, 1]
    assert not list(tmp_path.glob(".storing*"))


def test_bad_input_is_found_before_the_target_is_loaded(folder, written, monkeypatch):
    monkeypatch.setattr(GenerateArguments, "load_target", None)
    (folder / "file").write_text("")
    texts_file = str(folder / "texts.jsonl")
    for changes, message in (
        ({"sampled": 2}, "sampled=2 is a share"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"output_dir": ""}, "output_dir is missing"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be from 0 to world_size - 1"),
        ({"output_dir": str(folder / "file/below")}, "cannot be written"),
        ({"dataset": "no/such-data"}, "cannot be read"),
        ({"count": 50}, "has 40 prompts"),
        ({"max_new_tokens": 250}, r"has \d+ tokens, of which 6 fit"),
        ({"dataset": texts_file, "begin": 250}, "do not fit into the target's context of 256"),
        (
            {"dataset": texts_file, "begin": 220},
            "holds only short texts .no text has more than 220 tokens.: .*; ask for shorter",
        ),
        ({"output_dir": str(folder / "written"), "temperature": 0.5}, "temperature=1.0, now it is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(arguments(folder, "bad", **changes), MaxGram())


def test_rows_of_other_prompts_are_not_mixed(folder, written, monkeypatch):
    monkeypatch.setattr(GenerateArguments, "load_target", None)
    changed = write_lines(folder / "changed.jsonl", [{"prompt": sentence(9, 90 + i)} for i in range(40)])
    (folder / "some/parts").mkdir(parents=True)
    some = (folder / "written/parts/00000.jsonl").read_bytes()[:500]
    (folder / "some/parts/00000.jsonl").write_bytes(some)
    for name in ("written", "some"):  # a data set, and the parts of one
        with pytest.raises(ValueError, match=r"follows another prompt .* today's date: set it by chat_template_opt"):
            generate(arguments(folder, name, dataset=changed), MaxGram())


def test_without_datasets_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install csdraft\[train\]"):
        generate(arguments(folder, "none"), MaxGram())


def test_rows_are_an_ordinary_data_set(folder, written):
    rows = datasets.load_from_disk(folder / "written")
    assert rows.column_names == ["input_ids", "prompt_length", "index"]
