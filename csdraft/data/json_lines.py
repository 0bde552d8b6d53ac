"""Reads JSON files of rows: one object per line, or one list of objects. Errors name the file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

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
