"""Work in a folder continues only with the options that it began with; an error names those that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_unchanged", "plain"]


def check_unchanged(begun: str, before: Mapping[str, Any], now: Mapping[str, Any], way_out: str) -> None:
    """Raises ValueError if a key that both have has another value now.

    Args:
        begun: the beginning of the message, which continues with "key=value".
        before: the options as they were noted; see `plain`.
        now: the options of this call.
        way_out: what the user can do, as a sentence without its full stop.
    """
    other = [key for key in before if key in now and before[key] != now[key]]
    if other:
        differences = "; ".join(f"{key}={before[key]!r}, now it is {now[key]!r}" for key in other)
        raise ValueError(f"{begun} {differences}. {way_out}")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON stores them. Only the last part of an existing path is kept, because folders may be moved."""
    return {key: json.loads(json.dumps(_name(value), default=str)) for key, value in options.items()}


def _name(value: Any) -> Any:
    if isinstance(value, str) and value and Path(value).exists():
        return Path(value).resolve().name
    return value
