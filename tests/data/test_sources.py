"""Any source as rows: the same text in any container gives the same rows, and what cannot be trained on is refused."""

from __future__ import annotations

import lzma

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from csdraft.data.sources import read_prompts, read_rows, revision_of
from tests.data.words import CLOSED, FORGETFUL, LATE, MARKED, PLAIN, WORDS, make_tokenizer, sentence, write_lines
from tests.tiny import BOS, EOS

TEXTS = [sentence(words, seed) for seed, words in enumerate([5, 40, 1, 12])]
PAIRS = [{"prompt": sentence(4, i), "response": sentence(3 + i, 10 + i)} for i in range(3)]
TALK = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w8 w9 w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids_of(rows) -> list[list[int]]:
    return [list(row["input_ids"]) for row in rows]


def words(ids, scored=None) -> str:
    return " ".join(WORDS[token] for token, s in zip(ids, scored or [1] * len(ids), strict=True) if s)


def stored(kind: str, folder, rows: list[dict]) -> str:
    """The rows in a container of this kind."""
    data = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        return write_lines(folder / "rows.jsonl", rows)
    if kind == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "folder":
        (folder / "rows").mkdir()
        data.to_parquet(folder / "rows/train-00000-of-00001.parquet")
    elif kind == "saved":
        data.save_to_disk(folder / "rows")
    else:
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "rows")
    return str(folder / "rows")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved", "splits"])
def test_a_text_is_the_same_from_any_container(kind, tmp_path, tokenizer):
    rows = read_rows(stored(kind, tmp_path, [{"text": text, "other": 1} for text in TEXTS]), tokenizer, 16)
    whole = [[*tokenizer(text)["input_ids"], EOS] for text in TEXTS]
    assert ids_of(rows) == [text[i : i + 16] for text in whole for i in range(0, len(text), 16)]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert {row["prompt_length"] for row in rows} == {0}


@pytest.mark.parametrize("name", ["texts.txt", "texts.txt.xz", "folder"])
def test_a_corpus_gives_the_texts_of_its_documents(name, tmp_path, tokenizer):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for i, text in enumerate(TEXTS):
            (path / f"{i}.md").write_text(text)
    else:
        with (lzma.open if name.endswith("xz") else open)(path, "wt") as file:
            file.write("<|endoftext|>".join(TEXTS))
    expected = [[*tokenizer(text)["input_ids"], EOS] for text in TEXTS]
    assert sorted(ids_of(read_rows(str(path), tokenizer, 64))) == sorted(expected)


def test_a_split_and_a_limit_are_read_alone(tmp_path, tokenizer):
    source = stored("splits", tmp_path, [{"text": text} for text in TEXTS])
    assert len(read_rows(source, tokenizer, 64, split="test")) == 1
    assert ids_of(read_rows(source, tokenizer, 64, limit=2)) == ids_of(read_rows(source, tokenizer, 64))[:2]


@pytest.mark.slow
def test_stdlib_parts_do_not_share_a_document(tokenizer):
    train, test = (read_prompts("stdlib", as_bytes, longest=200, split=split) for split in ("train", "test"))
    assert len(train) > 10 * len(test) > 10
    assert not {tuple(text) for text in train} & {tuple(text) for text in test if len(text) == 200}
    with pytest.raises(ValueError, match="not 'validation'"):
        read_rows("stdlib", tokenizer, 64, split="validation")


def as_bytes(text: str) -> dict[str, list[int]]:
    """A tokenizer whose tokens are bytes."""
    return {"input_ids": list(text[:200].encode())}


as_bytes.bos_token_id = None


def test_texts_open_and_close_once(tmp_path):
    """Whether the tokenizer adds the opening token itself or leaves it to the user."""
    source = write_lines(tmp_path / "rows.jsonl", [{"text": TEXTS[0]}])
    adds = make_tokenizer(opens=True)
    leaves = make_tokenizer()
    leaves.bos_token = "<s>"
    for tokenizer in (adds, leaves):
        (row,) = read_rows(source, tokenizer, 64)
        assert (row["input_ids"][0], row["input_ids"].count(BOS)) == (BOS, 1)
        assert (row["input_ids"][-1], row["input_ids"].count(EOS)) == (EOS, 1)


@pytest.mark.parametrize("response", ["response", "completion", "answer", "chosen"])
def test_responses_are_scored_and_prompts_are_not(response, tmp_path, tokenizer):
    rows = [{"prompt": pair["prompt"], response: pair["response"]} for pair in PAIRS]
    for row, pair in zip(read_rows(stored("jsonl", tmp_path, rows), tokenizer, 64), PAIRS, strict=True):
        assert words(row["input_ids"][: row["prompt_length"]]) == pair["prompt"]
        assert words(row["input_ids"][row["prompt_length"] :]) == f"{pair['response']} </s>"


def test_a_response_is_cut_to_fit_and_a_prompt_is_not(tmp_path, tokenizer):
    source = write_lines(tmp_path / "rows.jsonl", PAIRS)
    assert [len(row["input_ids"]) for row in read_rows(source, tokenizer, 6)] == [6, 6, 6]
    with pytest.raises(ValueError, match=r"prompt of .* has 4 tokens, which leaves no room in max_length=4"):
        read_rows(source, tokenizer, 4)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_what_the_assistant_said_is_scored(template, kind, tmp_path):
    source = stored(kind, tmp_path, [{"messages": TALK}])
    (row,) = read_rows(source, make_tokenizer(template), 64)
    said = "<system> w1 </s> <user> w2 w3 </s> <assistant> w8 w9 w4 </s> <user> w5 </s> <assistant> w6 w7 </s>"
    assert words(row["input_ids"]) == said
    assert words(row["input_ids"], row["scored"]) == "w8 w9 w4 </s> w6 w7 </s>"
    assert row["prompt_length"] == row["scored"].index(1)


def test_what_a_template_rewrote_is_not_scored(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": TALK}])
    (row,) = read_rows(source, make_tokenizer(FORGETFUL), 64)
    assert "w8" not in words(row["input_ids"])
    assert words(row["input_ids"], row["scored"]).split()[-3:] == ["w6", "w7", "</s>"]
    assert "w5" not in words(row["input_ids"], row["scored"])


def test_what_follows_a_turn_that_was_written_anew_is_not_scored(tmp_path):
    """Two assistant turns in a row: in decoding the second follows the first one's thoughts, dropped here."""
    turns = [*TALK[:3], {"role": "assistant", "content": "w10"}, *TALK[3:]]
    source = write_lines(tmp_path / "twice.jsonl", [{"messages": turns}])
    (row,) = read_rows(source, make_tokenizer(FORGETFUL), 64)
    assert words(row["input_ids"], row["scored"]) == "w6 w7 </s>"
    (row,) = read_rows(source, make_tokenizer(PLAIN), 64)
    assert words(row["input_ids"], row["scored"]) == "w8 w9 w4 </s> w10 </s> w6 w7 </s>"


def test_a_question_that_is_written_otherwise_once_it_is_answered_is_not_scored(tmp_path):
    """Nor its answer, which would follow another text in decoding."""
    source = write_lines(tmp_path / "talk.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}])
    (row,) = read_rows(source, make_tokenizer(LATE), 64)
    assert words(row["input_ids"], row["scored"]) == "w8 w9 w4 </s>"
    first, _ = read_rows(source, make_tokenizer(CLOSED), 64)
    assert words(first["input_ids"], first["scored"]) == "w8 w9 w4 </s> w6 w7 </s> <pad>"


def test_a_template_may_write_nothing_before_a_users_turn(tmp_path):
    """What the assistant said before one is read and not scored, as that which begins a conversation."""
    users = "{% if messages | selectattr('role', 'equalto', 'user') | list == [] %}{{ raise_exception('no user') }}"
    for turns in ([TALK[0], TALK[4], *TALK[1:3]], [TALK[4], *TALK[1:3]]):
        source = write_lines(tmp_path / "talk.jsonl", [{"messages": turns}])
        (row,) = read_rows(source, make_tokenizer(users + "{% endif %}" + PLAIN), 64)
        assert words(row["input_ids"], row["scored"]) == "w8 w9 w4 </s>"
        assert "w6 w7" in words(row["input_ids"])


def test_an_answer_may_repeat_its_question(tmp_path):
    """As in data sets of preferences."""
    repeated = {"prompt": TALK[:2], "chosen": TALK[:3]}
    source = write_lines(tmp_path / "talk.jsonl", [repeated, {"prompt": TALK[:2], "chosen": TALK[2:3]}])
    rows = read_rows(source, make_tokenizer(PLAIN), 64)
    assert ids_of(rows)[0] == ids_of(rows)[1]
    assert words(rows[0]["input_ids"]) == "<system> w1 </s> <user> w2 w3 </s> <assistant> w8 w9 w4 </s>"


def test_other_spellings_of_conversations(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    tokenizer = make_tokenizer(PLAIN)
    usual = read_rows(write_lines(tmp_path / "a.jsonl", [{"messages": TALK}]), tokenizer, 64)
    other = read_rows(write_lines(tmp_path / "b.jsonl", [{"conversations": turns}]), tokenizer, 64)
    parted = read_rows(
        write_lines(tmp_path / "c.jsonl", [{"prompt": TALK[:-1], "completion": TALK[-1:]}]), tokenizer, 64
    )
    assert ids_of(usual) == ids_of(other) == ids_of(parted)


def test_a_chat_prompt_ends_with_the_assistants_header(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": TALK}])
    (prompt,) = read_prompts(source, make_tokenizer(PLAIN))
    assert words(prompt).endswith("<user> w5 </s> <assistant>")


def test_rows_that_are_tokens_stay_what_they_are(tmp_path, tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "prompt_length": 2, "index": 41}]
    source = stored("saved", tmp_path, rows)
    assert [dict(row) for row in read_rows(source, tokenizer, 64)] == rows
    assert read_prompts(source, tokenizer) == [[5, 6]]
    with pytest.raises(ValueError, match="made with another tokenizer"):
        read_rows(write_lines(tmp_path / "foreign.jsonl", [{"input_ids": [5, 970]}]), tokenizer, 64)


MASKED = {
    "labels": {"labels": [-100, -100, 7, 0, 9]},
    "completion mask": {"completion_mask": [0, 0, 1, 1, 1]},
    "assistant's mask": {"assistant_masks": [0, 0, 1, 1, 1]},
    "own scores": {"scored": [0, 0, 1, 1, 1], "prompt_length": 2, "labels": [-100] * 5},
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_masks_of_other_tools_are_read(name, kind, tmp_path, tokenizer):
    """Padding, here on both sides, is no text."""
    ids = {"input_ids": [5, 6, 7, 0, 9], **MASKED[name]}
    padded = {"input_ids": [0, 0, 5, 6, 0], "attention_mask": [0, 0, 1, 1, 0]}
    longer = {key: [value[0], *value, value[-1]] for key, value in ids.items() if isinstance(value, list)}
    both = [ids | {"attention_mask": [1] * 5}, ids | longer | {"attention_mask": [0, 1, 1, 1, 1, 1, 0]}]
    for row in read_rows(stored(kind, tmp_path, both), tokenizer, 8):
        assert row == {
            "input_ids": ids["input_ids"],
            "prompt_length": 2,
            "scored": [0, 0, 1, 1, 1],
            "index": row["index"],
        }
    source = write_lines(tmp_path / "more.jsonl", [ids, padded, {"input_ids": [5, 6], "labels": [1]}])
    assert ids_of(read_rows(source, tokenizer, 8)) == [ids["input_ids"], [5, 6]]
    assert read_prompts(source, tokenizer)[0] == [5, 6]


def test_a_response_has_no_space_of_its_own(tmp_path):
    """Sentencepiece puts one before a text that begins; a response follows its prompt."""
    pieces = {"\u2581w1": 3, "w1": 4, "\u2581": 5, "\n": 6, "\u2581w2": 7, "</s>": 1}
    model = Tokenizer(WordLevel(pieces, unk_token="</s>"))
    model.pre_tokenizer = Sequence([Metaspace(prepend_scheme="first"), Split("\n", "isolated")])
    follows = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    pairs = [{"prompt": "w1\n", "response": "w1 w2"}, {"prompt": "w1", "response": " w1"}]
    rows = read_rows(write_lines(tmp_path / "pairs.jsonl", pairs), follows, 8)
    assert ids_of(rows) == [[3, 6, 4, 7, 1], [3, 3, 1]]
    single = Tokenizer(Unigram([("</s>", 0.0), ("\u2581", -1.0), ("w", -1.0)], unk_id=0))
    single.normalizer, single.pre_tokenizer = Replace("\n", " "), Metaspace()
    begins = PreTrainedTokenizerFast(tokenizer_object=single, eos_token="</s>")  # T5's knows no line break
    rows = read_rows(write_lines(tmp_path / "pair.jsonl", [{"prompt": "w", "response": "w"}]), begins, 8)
    assert ids_of(rows) == [[1, 2, 1, 2, 0]]


def test_texts_are_tokenized_once_where_a_tokenizer_puts_nothing_before_them(tmp_path):
    read: list[str] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            read.extend(texts)
            return super().__call__(texts, **options)

    counting = Counting(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    assert len(read_rows(write_lines(tmp_path / "pairs.jsonl", PAIRS), counting, 64)) == len(PAIRS)
    assert sorted(read) == sorted(text for pair in PAIRS for text in pair.values())


def test_prompts_are_cut_only_from_texts(tmp_path, tokenizer):
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    assert [len(prompt) for prompt in read_prompts(texts, tokenizer, longest=8)] == [5, 8, 1, 8]
    prompts = write_lines(tmp_path / "prompts.jsonl", PAIRS)
    assert [words(prompt) for prompt in read_prompts(prompts, tokenizer, limit=2)] == [p["prompt"] for p in PAIRS[:2]]
    with pytest.raises(ValueError, match=r"prompt 0 of .* has 4 tokens, of which 3 fit"):
        read_prompts(prompts, tokenizer, longest=3)


def test_rows_know_the_revision_of_the_hub_that_they_are_from(tmp_path, tokenizer, monkeypatch):
    """As `datasets` notes it for the files that it has downloaded."""
    opened = datasets.Dataset.from_dict({"text": ["one two three", "four five"]})
    file = f"hf://datasets/me/texts@{'a' * 40}/data/train.parquet"
    opened.info.download_checksums = {file: {"num_bytes": 1, "checksum": None}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: opened)
    assert revision_of(read_rows("me/texts", tokenizer, 16)) == "a" * 40
    opened.info.download_checksums = {str(tmp_path / "train.parquet"): {"num_bytes": 1, "checksum": None}}
    assert revision_of(read_rows("me/texts", tokenizer, 16, limit=1)) is None
    assert revision_of([{"input_ids": [1]}]) is None


def test_what_is_no_data_set(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.doc").write_text("text")
    blank = write_lines(tmp_path / "blank.jsonl", [{"text": ""}, {"text": ""}])
    other = write_lines(tmp_path / "other.jsonl", [{"image": "w1", "label": 2}])
    chat = write_lines(tmp_path / "chat.jsonl", [{"messages": TALK}])
    saved = stored("splits", tmp_path, [{"text": TEXTS[0]}])
    for source, split, message in (
        (str(tmp_path / "empty.jsonl"), "train", "empty"),
        (str(tmp_path / "rows.doc"), "train", "ends in none of"),
        (blank, "train", "none with a token to train on"),
        (other, "train", "has columns image, label"),
        (chat, "train", "no chat template"),
        (saved, "validation", r"split 'validation' .* it has train, test\. .* choose with split="),
        ("no/such-data-set", "train", "cannot be read"),
        (str(tmp_path / "missing.jsonl"), "train", "missing.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(source, tokenizer, 16, split=split)
