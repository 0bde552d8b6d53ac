"""Training rows and evaluation prompts from any source: a corpus, a file, a saved data set, or a Hub id.

Rows that cannot be used are left out and counted by reason: one line on standard error reports them, and
`tally_of(rows)` has the numbers. A source without any usable row is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from csdraft.data.chat import ChatFormat, chat_prompt, check_template
from csdraft.data.messages import as_tools
from csdraft.data.opening import TOOLS, Source, open_source
from csdraft.data.reader import OUTCOME, Encoded, RowReader, content_of, text_of, with_bos
from csdraft.data.tally import Counted, Tally, Unusable, tally_of

__all__ = ["Source", "open_source", "prompts_of", "read_prompts", "read_rows", "revision_of", "tally_of", "texts_of"]

BATCH = 1000
"""Examples that are read together."""


def read_rows(
    source: str,
    tokenizer: Any,
    max_length: int,
    split: str = "train",
    limit: int | None = None,
    chat: ChatFormat | None = None,
) -> Any:
    """Texts as rows of token ids: a `datasets.Dataset`.

    A long text is split into pieces of `max_length`, each of them a row; what follows a prompt is cut to fit. A prompt
    without a response is a text. A text starts with the tokenizer's begin-of-text token and ends with its end-of-text
    token. Rows that cannot be used are left out and counted; see `csdraft.data.tally`.

    Args:
        source: 'stdlib' or 'stdlib-tests' (this Python's library, and its unit tests); a folder or .txt(.xz) file, as
            `read_corpus` reads them; a .jsonl or .json file, which is read into memory; a .parquet or .csv file; a
            folder of those, or of `save_to_disk`; or a Hub id, `name[:config][@revision]`.
        split: of the source. 'stdlib' and 'stdlib-tests' have 'train' and 'test', split by file name; a plain file is
            the whole of any split.
        limit: the most texts, prompts or conversations to read.
        chat: how conversations become tokens; None is the tokenizer's own template without options.

    Returns:
        Rows of `input_ids` (list of int), `prompt_length` (tokens that are not scored), `index` (number of the row)
        and, of conversations, `scored` (0 or 1 for each token: whether the assistant wrote it).

    Raises:
        ValueError: the source cannot be read, is empty or has no usable row; its tokens are not the tokenizer's; or it
            holds conversations and the tokenizer has no chat template.
    """
    found, chat = open_source(source, split, limit), chat or ChatFormat()
    if found.turns:
        check_template(tokenizer, f"{source!r} holds conversations", chat)
    reader = RowReader(found._replace(examples=None), tokenizer, max_length, chat)
    tally = Tally(source, len(found.examples), max_length)
    rows = _rows(found.examples, reader, tally)
    if not len(rows):
        raise ValueError(
            f"{source!r} holds {found.kind} rows, but none with a token to train on: {tally.read:,} read, "
            f"{tally.reasons}; correct the column {found.column!r}, or give another data set"
        )
    tally.show()
    return rows


def _rows(examples: Any, reader: RowReader, tally: Tally) -> Any:
    """A `datasets.Dataset` of the reader's rows; if the examples are one, `datasets` caches them."""
    import numpy as np
    from datasets import Dataset, Features, List, Value, concatenate_datasets

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
    if isinstance(examples, list):
        starts = range(0, len(examples), BATCH)
        read = (reader.read(examples[start : start + BATCH], range(start, start + BATCH)) for start in starts)
        rows: Any = concatenate_datasets([Dataset.from_dict(columns, features) for columns in read])
    else:
        rows = examples.map(
            reader,
            batched=True,
            with_indices=True,
            remove_columns=examples.column_names,
            features=features,
            desc=reader.source.name,
        )
    usable = []
    for batch in rows.select_columns([*OUTCOME]).iter(10_000):
        for number, cut, left_out, detail in zip(*(batch[name] for name in OUTCOME), strict=True):
            usable.append(not left_out)
            tally.cut += cut
            if left_out:
                tally.leave_out(number, left_out, detail)
    rows = rows.remove_columns([*OUTCOME])
    rows = rows if all(usable) else rows.select(np.flatnonzero(usable))
    rows = rows if "index" in reader.columns else rows.add_column("index", np.arange(len(rows)))
    rows.tally = tally
    return rows


def revision_of(rows: Any) -> str | None:
    """The Hub commit that these rows were read from; None if they are from elsewhere, or the commit is not known."""
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
    """Token ids of prompts: whole prompts, conversations up to their last user turn, the beginnings of texts.

    Args:
        source, split, chat: as for `read_rows`.
        limit: the most prompts to read.
        longest: tokens in a prompt; a text is cut to that, a longer prompt is an error.
        wrapped: whether prompts that are texts go through the chat template, as a user's turn.
    """
    return prompts_of(open_source(source, split, limit), tokenizer, longest, chat, wrapped)


def prompts_of(
    source: Source, tokenizer: Any, longest: int | None = None, chat: ChatFormat | None = None, wrapped: bool = False
) -> Counted:
    """`read_prompts` of an open source."""
    chat = chat or ChatFormat()
    if source.turns or wrapped:
        what = f"{source.name!r} holds conversations" if source.turns else "prompts are to be put into a chat template"
        check_template(tokenizer, what, chat)

    def ids_of(example: Mapping[str, Any], number: int) -> list[int]:
        ids = _prompt_ids(source, tokenizer, chat, wrapped, example, number)
        if not ids:
            raise Unusable(f"an empty {'text' if source.kind == 'text' else 'prompt'}")
        if source.kind == "text":
            return ids[:longest]
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"prompt {number} of {source.name!r} (row {number}, column {source.column!r}) has {len(ids)} "
                f"tokens, of which {longest} fit; leave it out, or ask for fewer new tokens"
            )
        return ids

    other = f"correct the column {source.column!r}, or give another data set"
    return _usable(source, ids_of, "no prompt that can be used", other)


def _prompt_ids(
    source: Source, tokenizer: Any, chat: ChatFormat, wrapped: bool, example: Mapping[str, Any], number: int
) -> list[int]:
    example = source.cleaned(example)
    value = content_of(example, number, source, tokenizer)
    if isinstance(value, Encoded):
        return value.input_ids[: value.prompt_length or None]
    if source.kind == "text":
        return with_bos(tokenizer(value)["input_ids"], tokenizer)
    if not source.turns and not wrapped:
        return tokenizer(value)["input_ids"]
    turns = value if source.turns else [{"role": "user", "content": value}]
    return chat_prompt(turns, tokenizer, chat, as_tools(example.get(TOOLS)))


def texts_of(source: Source, tokenizer: Any, longer_than: int) -> Counted:
    """Token ids of the texts that have more than `longer_than` tokens, in order."""

    def ids_of(example: Mapping[str, Any], number: int) -> list[int]:
        ids = tokenizer(text_of(example.get(source.column), "text"))["input_ids"]
        if len(ids) <= longer_than:
            raise Unusable(f"a text of no more than {longer_than} tokens")
        return ids

    return _usable(
        source, ids_of, f"only short texts (no text has more than {longer_than} tokens)", "ask for shorter beginnings"
    )


def _usable(source: Source, ids_of: Callable[[Mapping[str, Any], int], list[int]], none: str, way_out: str) -> Counted:
    """The token ids of each example, given with its number; reports those that are `Unusable`.

    Args:
        none, way_out: what a ValueError says the source holds, and its end, if all are.
    """
    found = Counted([], Tally(source.name, len(source.examples)))
    for number, example in enumerate(source.examples):
        try:
            found.append(ids_of(example, number))
        except Unusable as why:
            found.tally.leave_out(number, why.what, why.detail)
    if not found:
        raise ValueError(
            f"{source.name!r} holds {none}: {found.tally.read:,} rows read, {found.tally.reasons}; {way_out}"
        )
    found.tally.show()
    return found
