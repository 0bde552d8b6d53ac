"""Work in a folder is continued with the options that it was begun with: what differs is named and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_unchanged", "plain"]


def check_unchanged(begun: str, before: Mapping[str, Any], now: Mapping[str, Any], way_out: str) -> None:
    """Raises ValueError if a key that both have is of another value now.

    Args:
        begun: what was begun before, in words: the message opens with "`begun` key=value".
        before: options that were noted; see `plain`.
        now: options of this call.
        way_out: what the user can do about it, as a sentence.
    """
    other = [key for key in before if key in now and before[key] != now[key]]
    if other:
        differences = "; ".join(f"{key}={before[key]!r}, now it is {now[key]!r}" for key in other)
        raise ValueError(f"{begun} {differences}. {way_out}")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON keeps them; of a path that exists here only the last part, since runs are moved."""
    return {key: json.loads(json.dumps(_name(value), default=str)) for key, value in options.items()}


def _name(value: Any) -> Any:
    if isinstance(value, str) and value and Path(value).exists():
        return Path(value).resolve().name
    return value
