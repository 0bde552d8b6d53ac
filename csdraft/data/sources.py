"""Training rows and evaluation prompts from any source: a corpus, a file, a saved data set, or a Hub id.

Rows that cannot be used are left out, and counted with the reason: one line on the standard error says so, and
`tally_of(rows)` has the numbers. A source without any usable row is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from csdraft.data.chat import ChatFormat, chat_prompt, check_template
from csdraft.data.messages import as_tools
from csdraft.data.opening import TOOLS, Source, named, open_source
from csdraft.data.reader import OUTCOME, RowReader, conversation_of, count, opened, text_of, tokens_of, without_filled
from csdraft.data.tally import Counted, Tally, Unusable, attempt, tally_of

__all__ = ["Source", "open_source", "prompts_of", "read_prompts", "read_rows", "revision_of", "tally_of", "texts_of"]

BATCH = 256


def read_rows(
    source: str,
    tokenizer: Any,
    max_length: int,
    split: str = "train",
    limit: int | None = None,
    chat: ChatFormat | None = None,
) -> Any:
    """Texts as rows of token ids: a list of dicts, or a `datasets.Dataset` where the source is one.

    A long text is cut into pieces of `max_length`, each a row; what follows a prompt is cut to fit. A prompt without a
    response is a text. A text opens with the tokenizer's begin-of-text token and closes with its end-of-text token.
    Rows that cannot be used are left out, and counted as `csdraft.data.tally` says.

    Args:
        source: 'stdlib' or 'stdlib-tests' (this Python's library, and its unit tests); a folder or .txt(.xz) file, as
            `read_corpus` reads them; a .jsonl, .json, .parquet or .csv file; a folder of those, or of `save_to_disk`;
            or a Hub id, `name[:config][@revision]`.
        split: of the source; these two have 'train' and 'test', parted by file names; a plain file is all of any.
        limit: texts, prompts or conversations read at most.
        chat: how conversations become tokens; None is the tokenizer's own template without options.

    Returns:
        Rows of `input_ids` (list of int), `prompt_length` (tokens that are not scored), `index` (number of the row)
        and, of conversations, `scored` (one 0 or 1 a token: whether the assistant wrote it).

    Raises:
        ValueError: the source cannot be read, is empty or has no usable row, tokens are not the tokenizer's, or
            conversations meet a tokenizer without a chat template.
    """
    found, chat = open_source(source, split, limit), chat or ChatFormat()
    if found.turns:
        check_template(tokenizer, f"{source!r} holds conversations", chat)
    reader = RowReader(found._replace(examples=None), tokenizer, max_length, chat)
    tally = Tally(source, len(found.examples), max_length)
    with named(source):
        rows = (_listed if isinstance(found.examples, list) else _mapped)(found.examples, reader, tally)
    if not len(rows):
        raise ValueError(
            f"{source!r} holds {found.kind} rows, but none with a token to train on: {tally.read:,} read, "
            f"{tally.reasons}; correct the column {found.column!r}, or give another data set"
        )
    tally.show()
    return rows


def _listed(examples: Sequence[Mapping[str, Any]], reader: RowReader, tally: Tally) -> Counted:
    rows = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        for row in reader.rows(batch, range(start, start + len(batch))):
            count(tally, {name: [row.pop(name)] for name in OUTCOME})
            if row["input_ids"]:
                rows.append(row if "index" in reader.columns else row | {"index": len(rows)})
    return Counted(rows, tally)


def _mapped(examples: Any, reader: RowReader, tally: Tally) -> Any:
    """A `datasets.Dataset` of the reader's rows, computed once and kept in the cache of `datasets`."""
    import numpy as np
    from datasets import Features, List, Value

    types = {
        "input_ids": List(Value("int32")),
        "prompt_length": Value("int32"),
        "scored": List(Value("int8")),
        "index": Value("int64"),
        "source_row": Value("int64"),
        "cut": Value("bool"),
        "left_out": Value("string"),
        "detail": Value("string"),
    }
    features = Features({name: types[name] for name in (*reader.columns, *OUTCOME)})
    rows = examples.map(
        reader,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        features=features,
        desc=reader.source.name,
    )
    left_out: list[str] = []
    for batch in rows.select_columns(list(OUTCOME)).iter(10_000):
        count(tally, batch)
        left_out += batch["left_out"]
    rows = rows.remove_columns(list(OUTCOME))
    rows = rows.select([i for i, what in enumerate(left_out) if not what]) if any(left_out) else rows
    rows = rows if "index" in reader.columns else rows.add_column("index", np.arange(len(rows)))
    rows.tally = tally
    return rows


def revision_of(rows: Any) -> str | None:
    """The commit of the Hub that these rows were read from; None if they are from elsewhere, or it is not known."""
    files = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    found = {match[1] for file in files if (match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", file))}
    return found.pop() if len(found) == 1 else None


def read_prompts(
    source: str,
    tokenizer: Any,
    limit: int | None = None,
    longest: int | None = None,
    split: str = "test",
    chat: ChatFormat | None = None,
    wrapped: bool = False,
) -> Counted:
    """Token ids of prompts: prompts as they are, conversations up to their last user turn, the beginnings of texts.

    Args:
        source, split, chat: as for `read_rows`.
        limit: prompts read at most.
        longest: tokens of a prompt; a text is cut to it, a longer prompt is an error.
        wrapped: whether prompts that are texts go through the chat template, as a user's turn.
    """
    found = open_source(source, split, limit, in_memory=True)
    return prompts_of(found, tokenizer, longest, chat, wrapped)


def prompts_of(
    source: Source, tokenizer: Any, longest: int | None = None, chat: ChatFormat | None = None, wrapped: bool = False
) -> Counted:
    """`read_prompts` of a source that is open."""
    chat = chat or ChatFormat()
    if source.turns or wrapped:
        what = f"{source.name!r} holds conversations" if source.turns else "prompts are to be put into a chat template"
        check_template(tokenizer, what, chat)
    prompts, tally = [], Tally(source.name, len(source.examples), longest)
    with named(source.name):
        for number, example in enumerate(source.examples):
            ids = attempt(partial(_prompt_ids, source, tokenizer, chat, wrapped), (number, example))
            if isinstance(ids, Unusable):
                tally.leave_out(number, ids)
            elif source.kind == "text":
                prompts.append(ids[:longest])
            elif longest is not None and len(ids) > longest:
                raise ValueError(
                    f"prompt {number} of {source.name!r} (row {number}, column {source.column!r}) has {len(ids)} "
                    f"tokens, of which {longest} fit; leave it out, or ask for fewer new tokens"
                )
            else:
                prompts.append(ids)
    if not prompts:
        raise ValueError(
            f"{source.name!r} holds no prompt that can be used: {tally.read:,} rows read, {tally.reasons}; "
            f"correct the column {source.column!r}, or give another data set"
        )
    tally.show()
    return Counted(prompts, tally)


def _prompt_ids(
    source: Source, tokenizer: Any, chat: ChatFormat, wrapped: bool, row: tuple[int, Mapping[str, Any]]
) -> list[int]:
    (number, example), features = row, source.features or {}
    value = without_filled(example.get(source.column), features.get(source.column))
    if source.kind == "tokens":
        tokens = tokens_of(example, number, source, tokenizer)
        ids = tokens.ids[: tokens.prompt_length or None]
    elif source.turns:
        tools = as_tools(without_filled(example.get(TOOLS), features.get(TOOLS)))
        ids = chat_prompt(conversation_of(value), tokenizer, chat, tools)
    elif source.kind == "text":
        ids = opened(tokenizer(text_of(value, "text"))["input_ids"], tokenizer)
    elif wrapped:
        message = {"role": "user", "content": text_of(value, "prompt")}
        ids = chat_prompt([message], tokenizer, chat, as_tools(example.get(TOOLS)))
    else:
        ids = tokenizer(text_of(value, "prompt"))["input_ids"]
    if not ids:
        raise Unusable(f"an empty {'text' if source.kind == 'text' else 'prompt'}")
    return ids


def texts_of(source: Source, tokenizer: Any, longer_than: int) -> Counted:
    """Token ids of texts, in their order, without those that have no more than `longer_than` tokens."""
    texts, tally = [], Tally(source.name, len(source.examples))
    for start in range(0, len(source.examples), BATCH):
        with named(source.name):
            found = [source.examples[i].get(source.column) for i in range(start, min(start + BATCH, tally.read))]
        found = [attempt(partial(text_of, what="text"), value) for value in found]
        encoded = iter(tokenizer([text for text in found if isinstance(text, str)] or [""])["input_ids"])
        for number, text in enumerate(found, start):
            ids = next(encoded) if isinstance(text, str) else []
            if len(ids) > longer_than:
                texts.append(ids)
            else:
                short = Unusable(f"a text of no more than {longer_than} tokens")
                tally.leave_out(number, text if isinstance(text, Unusable) else short)
    if not texts:
        raise ValueError(
            f"{source.name!r}: no text has more than {longer_than} tokens ({tally.reasons}); ask for shorter "
            "beginnings"
        )
    tally.show()
    return Counted(texts, tally)
