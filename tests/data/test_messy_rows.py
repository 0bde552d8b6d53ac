"""Rows as people have them: each is read with the right tokens, or left out and counted with its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from csdraft.data.chat import ChatFormat
from csdraft.data.sources import read_prompts, read_rows, tally_of
from tests.data.words import CALLING, MARKED, NEEDS_CONTENT, PARTED, PLAIN, STRICT, WORDS, make_tokenizer, write_lines

USER, ANSWER = {"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}
CALL = {"type": "function", "function": {"name": "w7", "arguments": {"w10": "w11"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL_TALK = [USER, CALLED, {"role": "tool", "content": "w4"}, ANSWER]
TOOL_WORDS = "<user> w2 </s> <assistant> w7 w10 w11 </s> <user> w4 </s> <assistant> w3 </s>"
GOOD = {"messages": [USER, ANSWER]}


def talk(*turns: object) -> dict:
    return {"messages": list(turns)}


def words(ids, scored=None) -> str:
    return " ".join(WORDS[token] for token, s in zip(ids, scored or [1] * len(ids), strict=True) if s)


def reasons(rows) -> dict[str, int]:
    return {what: reason.rows for what, reason in tally_of(rows).left_out.items()}


# Left out, with a reason.

PAIRED = {"prompt": "w1", "response": "w2"}
OUT = {
    "null response": ([PAIRED, {"prompt": "w3", "response": None}], "no response"),
    "missing response": ([PAIRED, {"prompt": "w3"}], "no response"),
    "empty response": ([PAIRED, {"prompt": "w3", "response": " "}], "an empty response"),
    "number as response": ([PAIRED, {"prompt": "w3", "response": 4}], "a number as response"),
    "null prompt": ([PAIRED, {"prompt": None, "response": "w3"}], "no prompt"),
    "object as prompt": ([PAIRED, {"prompt": {"w": 1}, "response": "w3"}], "an object as prompt"),
    "list as text": ([{"text": "w1 w2"}, {"text": ["w1"]}], "a list as text"),
    "empty text": ([{"text": "w1 w2"}, {"text": ""}], "an empty text"),
    "half an emoji": ([{"text": "w1 w2"}, {"text": "w1 \ud83d"}], "half a character in its text"),
    "half an emoji said": ([GOOD, talk(USER | {"content": "\ud83d"}, ANSWER)], "half a character in a user turn"),
    "null row": ([{"text": "w1 w2"}, None], "no text"),
    "null tokens": ([{"input_ids": [5, 6]}, {"input_ids": None}], "no tokens"),
    "no token": ([{"input_ids": [5, 6]}, {"input_ids": []}], "fewer than 2 tokens"),
    "one token": ([{"input_ids": [5, 6]}, {"input_ids": [5]}], "fewer than 2 tokens"),
    "a fraction as token": ([{"input_ids": [5, 6]}, {"input_ids": [5.5, 6]}], "tokens that are not whole numbers"),
    "words as tokens": ([{"input_ids": [5, 6]}, {"input_ids": ["w1", "w2"]}], "tokens that are not whole numbers"),
    "only a prompt": (
        [{"input_ids": [5, 6], "prompt_length": 1}, {"input_ids": [5, 6], "prompt_length": 2}],
        "no token to train on",
    ),
    "no score": (
        [{"input_ids": [5, 6], "scored": [0, 1]}, {"input_ids": [5, 6], "scored": [0, 0]}],
        "no token to train on",
    ),
    "scores of others": (
        [{"input_ids": [5, 6], "scored": [0, 1]}, {"input_ids": [5, 6], "scored": [1]}],
        "a scored list that is not as long as its tokens",
    ),
    "score before the prompt's end": (
        [{"input_ids": [5, 6, 7], "scored": [0, 1, 0]}, {"input_ids": [5, 6, 7], "scored": [1, 0, 0]}],
        "no token to train on",
    ),
    "number as scores": (
        [{"input_ids": [5, 6], "scored": None}, {"input_ids": [5, 6], "scored": 1}],
        "a number as scored",
    ),
    "a number too large as index": (
        [{"input_ids": [5, 6], "index": 0}, {"input_ids": [5, 6], "index": 1 << 63}],
        "a number as index",
    ),
    "text as index": ([{"input_ids": [5, 6], "index": 0}, {"input_ids": [5, 6], "index": "w"}], "text as index"),
    "null conversation": ([GOOD, {"messages": None}], "a null conversation"),
    "empty conversation": ([GOOD, talk()], "an empty conversation"),
    "text as conversation": ([GOOD, {"messages": "w1"}], "text in place of a conversation"),
    "null turn": ([GOOD, talk(USER, None, ANSWER)], "a turn that is not an object"),
    "no role": ([GOOD, talk({"content": "w1"}, ANSWER)], "a turn without a role"),
    "null content": ([GOOD, talk({"role": "user", "content": None}, ANSWER)], "a user turn without content"),
    "number as content": (
        [GOOD, talk({"role": "user", "content": 5}, ANSWER)],
        "a number as the content of a user turn",
    ),
    "image": (
        [GOOD, talk({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER)],
        "an image_url part",
    ),
    "no assistant": ([GOOD, talk(USER)], "no assistant turn"),
    "empty answer": ([GOOD, talk(USER, {"role": "assistant", "content": ""})], "only empty assistant turns"),
    "answer first": (
        [GOOD, talk(ANSWER, USER)],
        "no assistant turn that the chat template writes after a question",
    ),
    "refused role": (
        [GOOD, talk({"role": "critic", "content": "w1"}, USER, ANSWER)],
        "a conversation that the chat template cannot write",
    ),
    "deep text": ([GOOD, {"messages": "[" * 100_000}], "text in place of a conversation"),
    "lost calls": ([GOOD, talk(*TOOL_TALK)], "tool calls, which the chat template does not write"),
    "calls of numbers": (
        [GOOD, talk(USER, {"role": "assistant", "tool_calls": [5]}, ANSWER)],
        "tool calls that are not a list of objects",
    ),
    "tools of numbers": ([GOOD | {"tools": None}, GOOD | {"tools": 5}], "a number in place of a list of tools"),
    "long prompt": ([PAIRED, {"prompt": "w1 " * 64, "response": "w2"}], "a prompt that fills max_length"),
}


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("order", [1, -1], ids=["second", "first"])
def test_a_row_that_cannot_be_used_is_left_out_and_counted(name, order, tmp_path, capsys):
    """Wherever it stands: the first row does not decide what the columns hold."""
    pair, reason = OUT[name]
    source = write_lines(tmp_path / "rows.jsonl", pair[::order])
    rows = read_rows(source, make_tokenizer(STRICT), 32)
    assert (len(rows), reasons(rows)) == (1, {reason: 1})
    number = 1 if order == 1 else 0
    assert f"{source}: 2 rows read; 1 left out (1 has {reason}, row {number}" in capsys.readouterr().err
    assert rows[0]["index"] == 0


@pytest.mark.parametrize("name", OUT)
def test_rows_none_of_which_can_be_used_are_one_error(name, tmp_path):
    (_, bad), reason = OUT[name]
    source = write_lines(tmp_path / "rows.jsonl", [bad, bad])
    if name == "missing response":  # prompts alone are texts
        assert len(read_rows(source, make_tokenizer(STRICT), 32)) == 2
        return
    with pytest.raises(ValueError, match=r"rows\.jsonl") as error:
        read_rows(source, make_tokenizer(STRICT), 32)
    said = str(error.value)
    assert "has no columns" in said if bad is None else f"2 have {reason}, first row 0" in said


def test_prompts_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys):
    tokenizer = make_tokenizer(STRICT)
    rows = [None, {"prompt": None}, {"prompt": ""}, {"prompt": 7}, {"prompt": "w1 w2"}]
    prompts = read_prompts(write_lines(tmp_path / "prompts.jsonl", rows), tokenizer)
    assert [words(prompt) for prompt in prompts] == ["w1 w2"]
    assert reasons(prompts) == {"no prompt": 2, "an empty prompt": 1, "a number as prompt": 1}
    assert "5 rows read; 4 left out (2 have no prompt, first row 0; 1 has an empty" in capsys.readouterr().err
    chats = [talk(ANSWER), talk({"role": "critic", "content": "w1"}, USER), {"messages": None}, GOOD]
    prompts = read_prompts(write_lines(tmp_path / "chats.jsonl", chats), tokenizer)
    assert [words(prompt) for prompt in prompts] == ["<user> w2 </s> <assistant>"]
    assert [reason.first for reason in prompts.tally.left_out.values()] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"bad.jsonl' holds no prompt .* 1 has no prompt, row 0; correct the column"):
        read_prompts(write_lines(tmp_path / "bad.jsonl", [{"prompt": None}]), tokenizer)


def test_cut_rows_are_counted_and_pieces_of_texts_are_not(tmp_path, capsys):
    pairs = [{"prompt": "w1", "response": "w2 " * n} for n in (1, 20, 30)]
    rows = read_rows(write_lines(tmp_path / "pairs.jsonl", pairs), make_tokenizer(), 8)
    assert tally_of(rows).described() == {"read": 3, "left_out": {}, "cut": 2}
    assert "pairs.jsonl: 3 rows read; 2 cut to 8 tokens\n" in capsys.readouterr().err
    rows = read_rows(write_lines(tmp_path / "texts.jsonl", [{"text": "w2 " * 20}]), make_tokenizer(), 8)
    assert (len(rows), tally_of(rows).cut) == (3, 0)
    assert "rows read" not in capsys.readouterr().err


# Files that are not what their name says.

BROKEN = {
    "broken": (b'{"text": "w1"}\n\n{"text": \n{"text": "w2"}\n', r"line 3 \(row 1\) of .* is not JSON"),
    "deep": (b'{"text": "w1"}\n{"text": ' + b"[" * 100_000, r"line 2 \(row 1\) of .* too deep to read; remove it"),
    "cut off": (b'{"text": "w1"}\n{"text": "w', r"line 2 \(row 1\) of .* is not JSON"),
    "number": (b'{"text": "w1"}\n5\n', r"line 2 \(row 1\) of .* is 5, not an object"),
    "list": (b'{"text": "w1"}\n["w1"]\n', r'line 2 \(row 1\) of .* is \["w1"\], not an object'),
    "latin": (b'{"text": "w1"}\n{"text": "\xe9"}\n', r"line 2 \(row 1\) of .* is not UTF-8"),
    "blank": (b"\n\n", "is empty"),
    "no columns": (b"{}\n{}\n", "has no columns"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(name, tmp_path):
    content, message = BROKEN[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for read in (lambda: read_rows(str(path), make_tokenizer(), 8), lambda: read_prompts(str(path), make_tokenizer())):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "rows.jsonl" in str(error.value)


def test_a_corpus_that_is_not_text_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.xz").write_bytes(b"\xfd7zXZ")
    for name in ("latin.txt", "cut.txt.xz"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as UTF-8 text"):
            read_rows(str(tmp_path / name), make_tokenizer(), 8)


def test_files_of_other_makes(tmp_path):
    """With a byte-order mark, packed, as one list, and with a null in place of the first row."""
    lines = b'{"text": "w1 w2"}\n{"text": "w3 w4"}\n'
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "list.json").write_text(json.dumps([json.loads(line) for line in lines.splitlines()]))
    (tmp_path / "null.jsonl").write_bytes(b"null\n" + lines)
    for path in tmp_path.glob("*.js*"):
        rows = read_rows(str(path), make_tokenizer(), 8)
        assert [words(row["input_ids"]) for row in rows] == ["w1 w2 </s>", "w3 w4 </s>"], path.name
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz' cannot be read"):
        read_rows(str(tmp_path / "cut.jsonl.gz"), make_tokenizer(), 8)


# Conversations that are read.


def one(tmp_path: Path, row: dict, template: str = CALLING, **options: object) -> dict:
    source = write_lines(tmp_path / "one.jsonl", [row])
    (found,) = read_rows(source, make_tokenizer(template), 64, chat=ChatFormat(options=options))
    return found


@pytest.mark.parametrize("template", [CALLING, NEEDS_CONTENT])
def test_tool_calls_are_scored_and_results_are_not(template, tmp_path):
    row = one(tmp_path, talk(*TOOL_TALK), template)
    assert words(row["input_ids"]) == TOOL_WORDS
    assert words(row["input_ids"], row["scored"]) == "w7 w10 w11 </s> w3 </s>"
    assert row["prompt_length"] == 4


SPELLINGS = {
    "arguments as JSON": [
        USER,
        CALLED | {"tool_calls": [{"function": {"name": "w7", "arguments": '{"w10": "w11"}'}}]},
    ],
    "calls as JSON": [USER, CALLED | {"tool_calls": json.dumps([CALL])}],
    "function_call": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}],
    "ShareGPT": [
        {"from": "human", "value": "w2"},
        {"from": "function_call", "value": json.dumps({"name": "w7", "arguments": {"w10": "w11"}})},
        {"from": "observation", "value": "w4"},
        {"from": "gpt", "value": "w3"},
    ],
    "ShareGPT's names as roles": [
        {"role": "human", "content": "w2"},
        {"role": "function_call", "content": json.dumps({"name": "w7", "arguments": {"w10": "w11"}})},
        {"role": "tool", "content": "w4"},
        {"role": "gpt", "content": "w3"},
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_tool_calls(name, tmp_path):
    turns = SPELLINGS[name]
    turns = turns if "ShareGPT" in name else [*turns, *TOOL_TALK[2:]]
    assert words(one(tmp_path, talk(*turns))["input_ids"]) == TOOL_WORDS


def test_a_conversation_may_be_json_text_or_an_object_of_lists(tmp_path):
    lists = {"role": ["user", "assistant"], "content": ["w2", "w3"]}
    for value in (lists, json.dumps([USER, ANSWER])):
        assert words(one(tmp_path, {"messages": value})["input_ids"]) == "<user> w2 </s> <assistant> w3 </s>"


def test_nulls_that_a_table_fills_in_are_not_written(tmp_path):
    """Arrow gives every call the arguments of all calls; a null in JSON was written by somebody, and stays."""
    other = {"type": "function", "function": {"name": "w8", "arguments": {"w12": "w13"}}}
    rows = [talk(*TOOL_TALK), talk(USER, CALLED | {"tool_calls": [other]}, *TOOL_TALK[2:])]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    stored = datasets.load_from_disk(tmp_path / "saved")
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"w10": "w11", "w12": None}
    first, second = read_rows(str(tmp_path / "saved"), make_tokenizer(CALLING), 64)
    assert words(first["input_ids"]) == TOOL_WORDS
    assert "w8 w12 w13 </s>" in words(second["input_ids"])
    kept = {"type": "function", "function": {"name": "w8", "arguments": {"w12": None, "w13": "w14"}}}
    rows = [*rows, talk(USER, CALLED | {"tool_calls": [kept]}, *TOOL_TALK[2:])]
    last = read_rows(write_lines(tmp_path / "rows.jsonl", rows), make_tokenizer(CALLING), 64)[2]
    assert "w8 w12 <pad> w13 w14 </s>" in words(last["input_ids"])  # None is no word of this tokenizer


@pytest.mark.parametrize("template", [PLAIN, CALLING, MARKED, PARTED])
def test_content_in_parts_is_its_text(template, tmp_path):
    """One text where the template wants text, parts where it writes parts."""
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]
    row = one(tmp_path, talk({"role": "user", "content": parts}, ANSWER | {"content": parts}), template)
    assert words(row["input_ids"]) == "<user> w5 w6 </s> <assistant> w5 w6 </s>"
    assert words(row["input_ids"], row["scored"]) == "w5 w6 </s>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_empty_turn_is_read_and_not_scored(template, tmp_path):
    row = one(tmp_path, talk(USER, ANSWER | {"content": ""}, USER, ANSWER), template)
    assert words(row["input_ids"]).startswith("<user> w2 </s> <assistant> </s> <user>")
    assert words(row["input_ids"], row["scored"]) == "w3 </s>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_turn_that_begins_a_conversation_is_not_scored(template, tmp_path):
    row = one(tmp_path, talk(ANSWER | {"content": "w9"}, USER, ANSWER), template)
    assert words(row["input_ids"], row["scored"]) == "w3 </s>"


def test_a_text_may_answer_a_conversation(tmp_path):
    row = one(tmp_path, {"prompt": [USER], "response": "w3 w4"})
    assert words(row["input_ids"], row["scored"]) == "w3 w4 </s>"


# What templates are given besides.


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "w20"}}]])
def test_a_prompt_is_the_beginning_of_its_row(options, tools, tmp_path):
    """Training sees what decoding shows, with the same tools and options."""
    source = write_lines(tmp_path / "rows.jsonl", [GOOD | {"tools": tools}])
    tokenizer, chat = make_tokenizer(CALLING.replace("</s> {% endfor %}", "</s> {% endfor %}")), ChatFormat()
    chat = ChatFormat(options=options)
    (prompt,) = read_prompts(source, tokenizer, chat=chat)
    header = "<assistant> w0" if options.get("enable_thinking") is False else "<assistant>"
    assert words(prompt) == f"{'w20 ' if tools else ''}<user> w2 </s> {header}"
    (row,) = read_rows(source, tokenizer, 64, chat=chat)
    shared = len(prompt) - ("w0" in header)  # this template does not write w0 before an answer
    assert row["prompt_length"] == shared
    assert row["input_ids"][:shared] == prompt[:shared]


def test_tools_of_a_row_win_over_those_of_the_options(tmp_path):
    tools = {name: [{"type": "function", "function": {"name": name}}] for name in ("w20", "w21")}
    rows = [GOOD | {"tools": tools["w20"]}, GOOD | {"tools": None}, GOOD | {"tools": json.dumps(tools["w20"])}]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    chat = ChatFormat.read(options={"tools": tools["w21"]})
    tokenizer = make_tokenizer(CALLING)
    for found in (
        read_prompts(source, tokenizer, chat=chat),
        [r["input_ids"] for r in read_rows(source, tokenizer, 64, chat=chat)],
    ):
        assert [words(ids).split()[0] for ids in found] == ["w20", "w21", "w20"]


def test_a_template_may_be_a_file_a_text_or_a_name(tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN)
    source = write_lines(tmp_path / "rows.jsonl", [GOOD])
    named = make_tokenizer()
    named.chat_template = {"default": CALLING, "short": PLAIN}
    for tokenizer, template in (
        (make_tokenizer(), str(tmp_path / "own.jinja")),
        (make_tokenizer(CALLING), PLAIN),
        (named, "short"),
    ):
        (prompt,) = read_prompts(source, tokenizer, chat=ChatFormat.read(template))
        assert words(prompt) == "<user> w2 </s> <assistant>"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("missing.jinja", None, "chat_template='missing.jinja': there is no such file"),
        ("short", None, "chat_template='short' is no file, no Jinja text and no name"),
        ("{% for %}{{", None, "the chat template is not valid Jinja"),
        (
            None,
            {"enable_thinkng": False},
            "chat_template_options has enable_thinkng, which the chat template does not",
        ),
        (None, {"add_generation_prompt": True}, "has add_generation_prompt, which csdraft sets itself"),
        (None, ["enable_thinking"], "must be what a template reads"),
        (None, {"tools": 5}, "a number in place of a list of tools; give a list of JSON schemas"),
    ],
)
def test_a_template_or_option_that_cannot_work_is_refused(template, options, message, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ValueError, match=message):
        read_rows(source, make_tokenizer(CALLING), 64, chat=ChatFormat.read(template, options))


def test_a_tokenizer_may_leave_ids_free(tmp_path):
    """Its largest id is then larger than its number of tokens."""
    tokenizer = Tokenizer(WordLevel({"w1": 0, "w2": 9}, unk_token="w1"))
    holed = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")
    source = write_lines(tmp_path / "rows.jsonl", [{"input_ids": [0, 9, 0]}])
    assert read_rows(source, holed, 8)[0]["input_ids"] == [0, 9, 0]
    with pytest.raises(ValueError, match="has token 10 in 'input_ids', and the tokenizer's ids end before 10"):
        read_rows(write_lines(tmp_path / "others.jsonl", [{"input_ids": [0, 10]}]), holed, 8)


def test_numbers_that_pandas_made_floats_are_numbers(tmp_path):
    """It does so to a whole column if a row has none."""
    columns = {"input_ids": [[5, 6, 7], [8, 9]], "prompt_length": [2.0, None], "index": [7.0, 3.0]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    rows = read_rows(str(tmp_path / "rows.parquet"), make_tokenizer(), 8)
    assert (rows["prompt_length"][:], rows["index"][:]) == ([2, 0], [7, 3])
