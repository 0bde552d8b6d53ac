"""Reads files: the documents of a corpus of plain text, split in two by name; and rows of JSON.

A JSON file has one object per line, or one list of objects. Errors name the file and line.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["END", "LIBRARIES", "Document", "read_corpus", "read_objects", "read_utf8", "split"]

END = "<|endoftext|>"
LIBRARIES = ("stdlib", "stdlib-tests")
"""Corpora that come with Python; their held-out files are the split 'test'."""
TEXT_SUFFIXES = {".py", ".md", ".txt"}
HELD_OUT_PERCENT = 4

# Parts of the standard library that are not written for people, or differ between machines.
LIBRARY = Path(sysconfig.get_path("stdlib"))
INSTALLED = {"site-packages", "dist-packages"}
LEFT_OUT = {*INSTALLED, "test", "tests", "idle_test", "encodings", "pydoc_data"}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by a hash of the name, so that adding or removing other documents never moves this one."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_corpus(corpus: str) -> list[Document]:
    """The documents of `stdlib`, `stdlib-tests`, a folder of .py, .md and .txt files, or a .txt or .txt.xz file.

    `END` separates the documents in a file.
    """
    path = Path(corpus)
    if corpus == "stdlib":
        documents = list(_read_folder(LIBRARY, _library("*.py", LEFT_OUT, LEFT_OUT_PREFIXES)))
    elif corpus == "stdlib-tests":
        documents = list(_read_folder(LIBRARY, _library("test_*.py", INSTALLED)))
    elif path.is_dir():
        documents = list(_read_folder(path, (p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES)))
    elif path.is_file():
        documents = list(_read_file(path))
    else:
        raise ValueError(
            f"corpus {corpus!r} is neither 'stdlib' nor a file or folder; give an existing path, or 'stdlib-tests'"
        )
    if not documents:
        raise ValueError(f"corpus {corpus!r} holds no text; give a folder of .py, .md or .txt files, or a .txt file")
    return documents


def _library(pattern: str, left_out: set[str], prefixes: tuple[str, ...] = ()) -> Iterator[Path]:
    for path in LIBRARY.rglob(pattern):
        if not any(part in left_out or part.startswith(prefixes) for part in path.relative_to(LIBRARY).parts):
            yield path


def _read_folder(root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    """Sorted by name; skips the few files that are deliberately not UTF-8."""
    for path in sorted(paths):
        with contextlib.suppress(UnicodeDecodeError):
            yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))


def _read_file(path: Path) -> Iterator[Document]:
    read = lzma.open if path.suffix == ".xz" else open
    try:
        with read(path, "rt", encoding="utf-8") as file:
            parts = file.read().split(END)
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"corpus {str(path)!r} cannot be read as UTF-8 text ({error}); convert it") from error
    return (Document(f"{path.name}#{i}", part.lstrip("\n")) for i, part in enumerate(parts) if part.strip())


def read_utf8(path: str | Path) -> str:
    """A text file; ValueError if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and documents held out."""
    train, held_out = [], []
    for document in documents:
        (held_out if document.held_out else train).append(document)
    return train, held_out


# Rows of JSON.

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BOM = b"\xef\xbb\xbf"


def read_objects(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """A file's rows. A `null` is a row without columns.

    Args:
        path: a file of lines, or of one list; compressed if its name ends in .gz, .xz or .bz2.
        limit: the most rows to return; those after them are not checked.

    Raises:
        ValueError: a line is not JSON, not an object or not UTF-8; it names file, line (from 1) and row (from 0).
    """
    path = Path(path)
    with OPENERS.get(path.suffix, open)(path, "rb") as file:  # type: ignore[operator]
        lines = ((number, line.removeprefix(BOM).strip()) for number, line in enumerate(file, 1))
        filled = ((number, line) for number, line in lines if line)
        first = next(filled, None)
        if first is None:
            return []
        values: Iterable[tuple[str, Any]]
        if first[1].startswith(b"["):
            file.seek(0)
            whole = _parsed(file.read().removeprefix(BOM), str(path))
            values = ((f"row {row}", value) for row, value in enumerate(whole))
        else:
            places = ((f"line {at} (row {row})", line) for row, (at, line) in enumerate(chain([first], filled)))
            values = ((where, _parsed(line, f"{where} of {path}")) for where, line in places)
        return [_object(value, where, path) for where, value in islice(values, limit)]


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason}); convert the file, or remove the line") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{where} is not JSON ({error.msg} at {at}); fix it, or remove it") from error
    except RecursionError as error:
        raise ValueError(f"{where} has lists in lists too deep to read; remove it") from error


def _object(value: Any, where: str, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        shown = json.dumps(value)
        raise ValueError(
            f"{where} of {path} is {shown[:60]}{'...' if len(shown) > 60 else ''}, not an object; write every row "
            'as {"prompt": ...} or another object of columns'
        )
    return value
