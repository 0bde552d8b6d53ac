"""Opens a source of rows (a corpus, a file, a saved data set, or a Hub id) and finds out what its rows hold.

JSON files and corpora are read into memory, all else by `datasets`. Columns are recognised by name. The first of these
columns that some row fills decides: `input_ids` (and `prompt_length`) are tokens, `messages` conversations, `prompt`
(and `response`) prompts, `text` texts.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from csdraft.data.text import LIBRARIES, TEXT_SUFFIXES, read_corpus, read_objects
from csdraft.data.text import split as parted

__all__ = ["GIVEN", "MASKS", "SHOWN", "TOOLS", "Kind", "Source", "open_source"]

Kind = Literal["tokens", "chat", "prompt", "text"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "chat": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question", "query"),
    "text": ("text", "content", "code"),
}
RESPONSES = ("response", "completion", "answer", "output", "chosen")
TOOLS = "tools"
"""The column with the tools that a row's conversation may call."""
GIVEN = ("prompt_length", "scored", "index")
"""Columns that may accompany tokens."""
SHOWN, MASKS = "attention_mask", ("labels", "completion_mask", "assistant_masks")
"""Those of other tools: 0 where a token is padding; and -100, or 0 in a mask, where it is not scored."""
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `save_to_disk` writes into a folder."""
DAMAGED = (OSError, EOFError, lzma.LZMAError)
"""Errors of reading damaged files."""


class Source(NamedTuple):
    """An open source, whose rows have not been read.

    Attributes:
        examples: a list of dicts or a `datasets.Dataset`.
        column: the column that decided on `kind`.
        response: the column with what follows prompts, if there is one.
        turns: whether the rows are lists of messages.
        columns: the columns that are read.
        features: the column types of a `datasets.Dataset`.
    """

    name: str
    examples: Any
    kind: Kind
    column: str
    response: str | None
    turns: bool
    columns: tuple[str, ...]
    features: Mapping[str, Any] | None = None

    def cleaned(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """An example's columns without the nulls that Arrow adds to objects whose keys differ."""
        if self.features is None or self.kind not in ("chat", "prompt"):
            return example
        return {name: _without_nulls(value, self.features[name]) for name, value in example.items()}


def open_source(source: str, split: str = "train", limit: int | None = None) -> Source:
    """Opens a source and finds out what it holds; for the arguments see `csdraft.data.sources.read_rows`.

    Raises:
        ValueError: the source cannot be read, is empty, or has no column with a known name.
    """
    if not source:  # as a path, it would be the folder that the command was called in
        raise ValueError("'' is no data set; give a Hub id, a file or a folder")
    path = Path(source)
    if path.is_file() and _suffix(path) in (".json", ".jsonl"):
        try:
            examples: Any = read_objects(path, limit)
        except DAMAGED as error:
            raise _unreadable(path, error) from error
    else:
        examples = _corpus(source, split) if _is_corpus(source) else _dataset(source, split)
    if not len(examples):
        raise ValueError(f"{source!r} is empty; give a data set with at least one row")
    if limit is not None:
        examples = examples[:limit] if isinstance(examples, list) else examples.take(min(limit, len(examples)))
    return _described(source, examples)


def _without_nulls(value: Any, feature: Any) -> Any:
    """A value without the nulls that Arrow adds. A column of type Json keeps its nulls: they were in the file."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_without_nulls(each, inner) for each in value]
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {name: _without_nulls(each, feature.get(name)) for name, each in value.items() if each is not None}
    return value


# What the columns hold.


def _described(source: str, examples: Any) -> Source:
    columns = _columns(examples)
    known: list[tuple[Kind, str]] = [
        (kind, name) for kind, names in NAMES.items() for name in names if name in columns
    ]
    if not known:
        wanted = ", ".join(name for names in NAMES.values() for name in names)
        found = f"columns {', '.join(columns)}" if columns else "no columns"
        raise ValueError(f"{source!r} has {found}; one of them must be {wanted}: rename it")
    filled = (found for found in known if _first(examples, found[1]) is not None)
    kind, column = next(filled, known[0])  # if all are empty, reading the rows reports it
    turns = kind == "chat" or (kind == "prompt" and _is_turns(_first(examples, column, _is_usual)))
    response = _response(examples, columns, turns) if kind == "prompt" else None
    others = {"tokens": (*GIVEN, SHOWN, *MASKS), "text": ()}.get(kind, (TOOLS,))
    read = (column, *([response] if response else []), *(name for name in others if name in columns))
    features = None
    if not isinstance(examples, list):  # other columns, such as images, are never decoded
        examples = examples.select_columns(list(read))
        features = dict(examples.features)
    return Source(source, examples, kind, column, response, turns, read, features)


def _response(examples: Any, columns: Sequence[str], turns: bool) -> str | None:
    """The first column of answers: texts, or messages after conversations, but no other objects."""
    for name in (name for name in RESPONSES if name in columns):
        value = _first(examples, name, _is_usual) or _first(examples, name)
        if (turns and _is_turns(value)) or not isinstance(value, list | Mapping):
            return name  # if these are numbers, or all empty, reading the rows reports it
    return None


def _is_usual(value: Any) -> bool:
    """Whether a value is a text or looks like a conversation."""
    return _is_turns(value) or (isinstance(value, str) and value != "")


def _is_turns(value: Any) -> bool:
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, Mapping) and ("role" in turn or "from" in turn)


def _columns(examples: Any) -> list[str]:
    if isinstance(examples, list):
        return list(dict.fromkeys(name for example in examples for name in example))
    return examples.column_names


def _is_filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _first(examples: Any, column: str, wanted: Callable[[Any], bool] = _is_filled) -> Any:
    """The first value in a column for which `wanted` is true; None if there is none."""
    values = (each.get(column) for each in examples) if isinstance(examples, list) else examples[column]
    return next(filter(wanted, values), None)


# Opening.


def _is_corpus(source: str) -> bool:
    """Whether `read_corpus` reads a source, rather than `datasets`."""
    path = Path(source)
    if path.is_dir():
        return not _is_saved(path) and not any(file.suffix in BUILDERS for file in path.rglob("*.*"))
    return source in LIBRARIES or (path.is_file() and set(path.suffixes[-2:]) & TEXT_SUFFIXES != set())


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def _corpus(source: str, split: str) -> list[dict[str, str]]:
    """The documents, shuffled in the same way every time."""
    documents = read_corpus(source)
    if source in LIBRARIES:
        parts = dict(zip(("train", "test"), parted(documents), strict=True))
        if split not in parts:
            raise ValueError(f"{source!r} has the splits 'train' and 'test', not {split!r}")
        documents = parts[split]
    return [{"text": document.text} for document in random.Random(0).sample(documents, len(documents))]


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"the file {str(path)!r} cannot be read: {_reason(error)}; give another file, or write it again")


def _dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"reading {source!r} needs datasets: pip install csdraft[train]") from error
    path = Path(source)
    if not path.exists() and path.suffix in BUILDERS:
        raise ValueError(f"there is no file {source!r}; give an existing file or folder, or a Hub id")
    if (path / "parts").is_dir() and (path / "arguments.json").is_file() and not _is_saved(path):
        raise ValueError(
            f"{source!r} is not finished: repeat the command that writes it, or give {source}/parts, which it has"
        )
    try:
        return _loaded(source, split, datasets)
    except (*DAMAGED, ValueError, datasets.exceptions.DatasetsError) as error:
        if path.is_file():
            raise _unreadable(path, error) from error
        raise ValueError(
            f"split {split!r} of the data set {source!r} cannot be read: {_reason(error)}. Where it has others, "
            "choose with split= (eval_split= of evaluation prompts)"
        ) from error


def _suffix(path: Path) -> str | None:
    return next((part for part in path.suffixes[::-1] if part in BUILDERS), None)


def _loaded(source: str, split: str, datasets: Any) -> Any:
    path = Path(source)
    if _is_saved(path):
        saved = datasets.load_from_disk(source)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"it has {', '.join(map(str, saved))}")
        return saved[split]
    if path.is_file():
        suffix = _suffix(path)
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


def _reason(error: BaseException) -> str:
    """The messages of an error and of its cause, on one line."""
    said = [str(each) for each in (error, error.__cause__) if each is not None and str(each)]
    return " ".join("; ".join(said).split())
