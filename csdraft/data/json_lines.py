"""JSON files of rows: an object a line, or one list of objects. What is wrong is told with its file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["OPENERS", "first_line", "is_lines", "read_objects"]

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BOM = b"\xef\xbb\xbf"


def is_lines(path: Path) -> bool:
    """Whether a file's name says that it holds an object a line."""
    return path.suffix == ".jsonl" and path.is_file()


def read_objects(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file. A `null` in place of an object is a row without columns.

    Args:
        path: of a file of lines, or of one list; packed if its name ends in .gz, .xz or .bz2.
        limit: rows read at most; what follows them is not looked at.

    Raises:
        ValueError: a line is no JSON, no object or no UTF-8; it names file, line (from 1) and row (from 0).
    """
    if first_line(path).startswith(b"["):
        return _listed(Path(path))[:limit]
    return list(islice(_rows(Path(path)), limit))


def first_line(path: str | Path) -> bytes:
    """The first line that is not blank; empty if there is none."""
    with _opened(Path(path)) as file:
        return next((line for line in _lines(file) if line), b"")


def _opened(path: Path) -> BinaryIO:
    return OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[return-value]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(file):
        yield (line.removeprefix(BOM) if number == 0 else line).strip()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    row = 0
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line:
                yield _object(
                    _parsed(line, f"line {number} (row {row}) of {path}"), f"line {number} (row {row})", path
                )
                row += 1


def _listed(path: Path) -> list[dict[str, Any]]:
    with _opened(path) as file:
        whole = _parsed(file.read().removeprefix(BOM), str(path))
    return [_object(value, f"row {row}", path) for row, value in enumerate(whole)]


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason}); convert the file, or remove the line") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{where} is not JSON ({error.msg} at {at}); fix it, or remove it") from error


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
