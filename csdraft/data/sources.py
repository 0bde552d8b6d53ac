"""Training rows and evaluation prompts from any source: a corpus, a file, a saved data set, or a Hub id.

Columns are recognised by name; the first of these that a source has decides what it holds: `input_ids` (and
`prompt_length`): tokens; `messages`: conversations; `prompt` (and `response`): prompts; `text`: texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from csdraft.data.chat import as_messages, chat_prompt, check_template, scored_chat
from csdraft.data.text import LIBRARIES, TEXT_SUFFIXES, read_corpus
from csdraft.data.text import split as parted

__all__ = ["Source", "open_source", "read_prompts", "read_rows", "revision_of"]

Kind = Literal["tokens", "chat", "prompt", "text"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "chat": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question", "query"),
    "text": ("text", "content", "code"),
}
RESPONSES = ("response", "completion", "answer", "output")
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a folder."""


class Source(NamedTuple):
    """Opened, but not read.

    Attributes:
        examples: a list of dicts or a `datasets.Dataset`.
        column: what decided on `kind`.
        response: the column of what follows prompts, if there is one.
        turns: whether prompts or texts are lists of messages.
        given: of "scored" and "index", the columns that tokens already have.
    """

    name: str
    examples: Any
    kind: Kind
    column: str
    response: str | None
    turns: bool
    given: tuple[str, ...]


def read_rows(source: str, tokenizer: Any, max_length: int, split: str = "train", limit: int | None = None) -> Any:
    """Texts as rows of token ids: a list of dicts, or a `datasets.Dataset` where the source is one.

    A long text is cut into pieces of `max_length`, each a row; what follows a prompt is cut to fit. A prompt without a
    response is a text. A text opens with the tokenizer's begin-of-text token and closes with its end-of-text token.

    Args:
        source: 'stdlib' or 'stdlib-tests' (this Python's library, and its unit tests); a folder or .txt(.xz) file, as
            `read_corpus` reads them; a .jsonl, .json, .parquet or .csv file; a folder of those, or of `save_to_disk`;
            or a Hub id, `name[:config][@revision]`.
        split: of the source; these two have 'train' and 'test', parted by file names; a plain file is all of any.
        limit: texts, prompts or conversations read at most.

    Returns:
        Rows of `input_ids` (list of int), `prompt_length` (tokens that are not scored), `index` (number of the row)
        and, of conversations, `scored` (one 0 or 1 a token: whether the assistant wrote it).

    Raises:
        ValueError: the source cannot be read or is empty, a prompt fills `max_length`, tokens are not the tokenizer's,
            or conversations meet a tokenizer without a chat template.
    """
    opened = open_source(source, split, limit)
    if opened.turns:
        check_template(tokenizer, source)
    reader = _RowReader(opened._replace(examples=None), tokenizer, max_length)
    if isinstance(opened.examples, list):
        read = (row for batch in _batches(opened.examples) for row in reader.rows(batch))
        rows = [row | {"index": index} for index, row in enumerate(read)]
    else:
        rows = _mapped(opened.examples, reader)
    if not len(rows):
        raise ValueError(
            f"{source!r} holds {opened.kind} rows, but none with a token to train on; give another data set"
        )
    return rows


def revision_of(rows: Any) -> str | None:
    """The commit of the Hub that these rows were read from; None if they are from elsewhere, or it is not known."""
    files = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    found = {match[1] for file in files if (match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", file))}
    return found.pop() if len(found) == 1 else None


def read_prompts(
    source: str, tokenizer: Any, limit: int | None = None, longest: int | None = None, split: str = "test"
) -> list[list[int]]:
    """Token ids of prompts: prompts as they are, conversations up to their last user turn, the beginnings of texts.

    Args:
        source, split: as for `read_rows`.
        limit: prompts read at most.
        longest: tokens of a prompt; a text is cut to it, a longer prompt is an error.
    """
    opened = open_source(source, split, limit)
    if opened.turns:
        check_template(tokenizer, source)
    prompts = []
    for number, example in enumerate(opened.examples):
        ids = _prompt_ids(opened, example, tokenizer)
        if opened.kind == "text":
            ids = ids[:longest]
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"prompt {number} of {source!r} has {len(ids)} tokens, of which {longest} fit; leave it out, or ask "
                "for fewer new tokens"
            )
        if ids:
            prompts.append(ids)
    if not prompts:
        raise ValueError(f"{source!r} holds no prompt that is not empty; give another data set")
    return prompts


def _prompt_ids(source: Source, example: Mapping[str, Any], tokenizer: Any) -> list[int]:
    value = example[source.column]
    if source.kind == "tokens":
        return list(value[: example.get("prompt_length") or len(value)])
    if not isinstance(value, str):
        return chat_prompt(as_messages(value), tokenizer)
    return (
        _opened(tokenizer(value)["input_ids"], tokenizer) if source.kind == "text" else tokenizer(value)["input_ids"]
    )


def open_source(source: str, split: str = "train", limit: int | None = None) -> Source:
    """The examples of a source as they are stored, and what they hold."""
    examples = _corpus(source, split) if _is_corpus(source) else _dataset(source, split)
    if not len(examples):
        raise ValueError(f"{source!r} is empty; give a data set with at least one row")
    if limit is not None:
        examples = (
            examples[:limit] if isinstance(examples, list) else examples.select(range(min(limit, len(examples))))
        )
    first = examples[0]
    for kind, names in NAMES.items():
        for column in names:
            if first.get(column) is not None:
                found = (
                    name for name in RESPONSES if kind == "prompt" and type(first.get(name)) is type(first[column])
                )
                given = tuple(name for name in ("scored", "index") if kind == "tokens" and name in first)
                turns = kind == "chat" or (kind == "prompt" and not isinstance(first[column], str))
                return Source(source, examples, kind, column, next(found, None), turns, given)
    wanted = ", ".join(name for names in NAMES.values() for name in names)
    raise ValueError(f"{source!r} has columns {', '.join(first)}; one of them must be {wanted}: rename it")


def _is_corpus(source: str) -> bool:
    """Whether `read_corpus` reads it: not a folder that `datasets` understands better."""
    path = Path(source)
    if path.is_dir():
        return not _is_saved(path) and not any(file.suffix in BUILDERS for file in path.rglob("*.*"))
    return source in LIBRARIES or (path.is_file() and set(path.suffixes[-2:]) & TEXT_SUFFIXES != set())


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def _corpus(source: str, split: str) -> list[dict[str, str]]:
    """Documents in the order of `Blocks`."""
    documents = read_corpus(source)
    if source in LIBRARIES:
        parts = dict(zip(("train", "test"), parted(documents), strict=True))
        if split not in parts:
            raise ValueError(f"{source!r} has the splits 'train' and 'test', not {split!r}")
        documents = parts[split]
    return [{"text": document.text} for document in random.Random(0).sample(documents, len(documents))]


def _dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"reading {source!r} needs datasets: pip install csdraft[train]") from error
    path = Path(source)
    suffix = next((part for part in path.suffixes[::-1] if part in BUILDERS), None)
    try:
        if _is_saved(path):
            saved = datasets.load_from_disk(source)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise ValueError(f"it has {', '.join(map(str, saved))}")
            return saved[split]
        if path.is_file():
            if suffix is None:
                raise ValueError(f"its name ends in none of {', '.join([*BUILDERS, *sorted(TEXT_SUFFIXES)])}")
            if not path.stat().st_size:
                return []
            return datasets.load_dataset(BUILDERS[suffix], data_files={split: source}, split=split)
        if path.is_dir():
            return datasets.load_dataset(source, split=split)
        name, _, revision = source.partition("@")
        name, _, config = name.partition(":")
        return datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"split {split!r} of the data set {source!r} cannot be read: {reason}. Where it has others, choose with "
            "split= (eval_split= of evaluation prompts)"
        ) from error


def _batches(examples: Sequence[Mapping[str, Any]], size: int = 256) -> Iterator[dict[str, list]]:
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        yield {name: [example[name] for example in batch] for name in batch[0]}


def _mapped(examples: Any, reader: _RowReader) -> Any:
    """A `datasets.Dataset` of the reader's rows, computed once and kept in the cache of `datasets`."""
    import numpy as np
    from datasets import Features, List, Value

    types = {
        "input_ids": List(Value("int32")),
        "prompt_length": Value("int32"),
        "scored": List(Value("int8")),
        "index": Value("int64"),
    }
    features = Features({name: types[name] for name in reader.columns})
    old = examples.column_names
    rows = examples.map(reader, batched=True, remove_columns=old, features=features, desc=reader.source.name)
    return rows if "index" in reader.columns else rows.add_column("index", np.arange(len(rows)))


@dataclass(frozen=True)
class _RowReader:
    """Examples of a source to rows; called by `datasets.Dataset.map` with batches."""

    source: Source
    tokenizer: Any
    max_length: int
    version: int = 1
    """To be raised whenever rows change: `datasets` keeps the rows of readers that look equal."""

    @property
    def columns(self) -> list[str]:
        scored = ("scored",) if self.source.turns else ()
        return ["input_ids", "prompt_length", *scored, *self.source.given]

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = list(self.rows(batch))
        return {name: [row[name] for row in rows] for name in self.columns}

    def rows(self, batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
        """The rows of a batch, which has a list a column. What leaves nothing to train on is left out."""
        values, responses = batch[self.source.column], batch.get(self.source.response or "")
        if self.source.kind == "tokens":
            yield from self._tokens(batch)
        elif self.source.turns:
            for turns, answer in zip(values, responses or [[]] * len(values), strict=True):
                yield from self._conversation(as_messages([*turns, *answer]))
        elif responses is not None:
            yield from self._answers(values, responses)
        else:
            yield from self._texts([text for text in values if text])

    def _texts(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        for ids in self.tokenizer(texts)["input_ids"] if texts else []:
            ids = _closed(_opened(ids, self.tokenizer), self.tokenizer)
            for start in range(0, len(ids), self.max_length):
                if len(ids) - start > 1:
                    yield {"input_ids": ids[start : start + self.max_length], "prompt_length": 0}

    def _answers(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[dict[str, Any]]:
        starts = self.tokenizer(prompts)["input_ids"]
        ends = self.tokenizer(responses, add_special_tokens=False)["input_ids"]
        for start, end in zip(starts, ends, strict=True):
            yield from self._cut([*start, *_closed(end, self.tokenizer)], len(start))

    def _conversation(self, messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        ids, scored = scored_chat(messages, self.tokenizer)
        if 1 in scored:
            yield from self._cut(ids, scored.index(1), {"scored": scored[: self.max_length]})

    def _tokens(self, batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
        for number, ids in enumerate(batch[self.source.column]):
            if len(ids) and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
                raise ValueError(
                    f"{self.source.name!r} has token {max(ids)}, the tokenizer {len(self.tokenizer)} tokens; the data "
                    "was made with another tokenizer: make it anew"
                )
            given = {name: batch[name][number] for name in self.source.given}
            if "scored" in given:
                given["scored"] = given["scored"][: self.max_length]
            yield from self._cut(list(ids), batch["prompt_length"][number] if "prompt_length" in batch else 0, given)

    def _cut(self, ids: list[int], prompt: int, more: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """One row, unless nothing of it is scored."""
        if prompt >= self.max_length:
            raise ValueError(
                f"a prompt of {self.source.name!r} has {prompt} tokens, which leaves no room in max_length="
                f"{self.max_length}; raise max_length, or leave that prompt out"
            )
        if len(ids) > max(prompt, 1):
            yield {"input_ids": ids[: self.max_length], "prompt_length": prompt, **(more or {})}


def _opened(ids: list[int], tokenizer: Any) -> list[int]:
    """Begins with the begin-of-text token, where the tokenizer has one but leaves it to the user."""
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
