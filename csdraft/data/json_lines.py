"""Reads JSON files of rows: one object per line, or one list of objects. Errors name the file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["read_objects"]

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
    values = _listed(path) if _first_line(path).startswith(b"[") else _on_lines(path)
    return [_object(value, where, path) for where, value in islice(values, limit)]


def _first_line(path: Path) -> bytes:
    """The first line that is not blank; empty if there is none."""
    with _opened(path) as file:
        return next((line for line in _lines(file) if line), b"")


def _opened(path: Path) -> BinaryIO:
    return OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[return-value]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(file):
        yield (line.removeprefix(BOM) if number == 0 else line).strip()


def _on_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value with its place."""
    row = 0
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line:
                where = f"line {number} (row {row})"
                yield where, _parsed(line, f"{where} of {path}")
                row += 1


def _listed(path: Path) -> Iterable[tuple[str, Any]]:
    """Each value with its place."""
    with _opened(path) as file:
        whole = _parsed(file.read().removeprefix(BOM), str(path))
    return ((f"row {row}", value) for row, value in enumerate(whole))


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
