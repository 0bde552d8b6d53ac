"""Reads files and folders that strangers may have written. If something is wrong with one, a ValueError names it.

It reads JSON objects (`read_object`), compares values with an annotation (`fit`), and opens nothing outside a folder
(`path_inside`). It imports nothing of csdraft, so every part may use it.
"""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = [
    "UNFIT", "check_config", "check_keys", "fit", "is_hub_id", "kind_of", "naming", "nearest", "path_inside",
    "read_fields", "read_object", "shown",
]  # fmt: skip

LARGEST = 1 << 63
"""Whole numbers of a document must be smaller, so that they fit into 64 bits."""
MOST_SHOWN = 120
"""Characters of a value that a message repeats."""
UNFIT = object()
"""A reader of `fit` returns it for a value that it does not take."""


def shown(value: object) -> str:
    """A value as a message shows it, shortened, in one line."""
    text = repr(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def kind_of(value: object) -> str:
    """A value's type with its article, such as 'an int'."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts a file's name, or a key, in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


# JSON.


def read_object(path: str | os.PathLike[str], name: object = None) -> dict[str, Any]:
    """The JSON object in a file. Messages call the file `name`, or by its path if that is None.

    Raises:
        ValueError: it is not UTF-8, not JSON or not an object, or has a key twice or a number that is not finite.
    """
    name = os.fspath(path) if name is None else name
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # some editors write a byte order mark
        found = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    except ValueError as error:  # not UTF-8, not JSON, or a key twice
        raise ValueError(f"{name} is not a JSON document: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds {shown(found)}, expected an object: {{...}}")
    if (at := _not_finite(found)) is not None:
        raise ValueError(f"{name}: {at} is not a finite number")
    return found


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


def _not_finite(document: Any) -> str | None:
    """Where a number is nan or infinite; None if all are finite."""
    waiting = [("", document)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return at
        if isinstance(value, dict):
            waiting += [(f"{at}.{key}" if at else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{at}[{i}]", inner) for i, inner in enumerate(value)]
    return None


# The config.json of a model.

ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
EXPERTS = ("_experts_implementation", "experts_implementation", "_experts_implementation_internal")
HEEDED = {
    **dict.fromkeys(ATTENTION, ("eager", "sdpa")),
    **dict.fromkeys(EXPERTS, ("eager", "batched_mm", "grouped_mm")),
}
"""What a file may choose. Transformers would download code for other names."""
COUNTS = (
    *("num_hidden_layers", "num_decoder_layers", "num_layers", "n_layer", "vocab_size", "hidden_size", "n_embd"),
    *("d_model", "intermediate_size", "d_ff", "num_attention_heads", "num_heads", "n_head", "num_key_value_heads"),
    *("head_dim", "d_kv", "max_position_embeddings", "n_positions"),
)
"""Sizes that must be at least 1."""


def check_config(document: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if a model's config, or one in it, names code to download or has sizes that no model has."""
    for key, value in document.items():
        if isinstance(value, Mapping) and key not in HEEDED:
            check_config(value, f"{name}: {key}")
        elif key in HEEDED and value is not None and value not in HEEDED[key]:
            raise ValueError(
                f"{name}: {key}={shown(value)}; a stored model may ask for {' or '.join(HEEDED[key])} only, since "
                "for other names code would be downloaded: remove the key"
            )
        elif key in COUNTS and isinstance(value, int) and value < 1:
            raise ValueError(f"{name}: {key}={shown(value)}; a model has at least 1")


# Values and annotations.

Reader = Callable[[Any, Sequence[Any], str], Any]
"""(value, types, place) -> the object that the value describes, or UNFIT. It is for types that `fit` does not know."""


def fit(value: Any, hint: Any, at: str, reader: Reader = lambda value, arms, at: UNFIT) -> Any:
    """A JSON value converted to the type of an annotation: lists become tuples, objects become dataclasses.

    Args:
        hint: a class, `X | Y`, `Literal`, `tuple[X, ...]`, `Sequence[X]`, `list[X]`, `dict[str, X]` or a dataclass.
        at: where the value stands, for messages.
        reader: called first, with the types that the annotation allows there.

    Raises:
        ValueError: the value has another type; the message names `at` and the value.
    """
    arms = _arms(hint)
    found = reader(value, arms, at)
    for arm in arms:
        if found is not UNFIT:
            return found
        found = _as(value, arm, at, reader)
    if found is not UNFIT:
        return found
    wanted = " or ".join(dict.fromkeys(map(_name, arms)))
    kind = "a number too large" if _too_large(value) else kind_of(value)
    raise ValueError(f"{at}={shown(value)} is {kind}; it takes {wanted}")


def _arms(hint: Any) -> list[Any]:
    """The members of a union, or a Literal for each value of a Literal."""
    if get_origin(hint) in (Union, types.UnionType):
        return [arm for member in get_args(hint) for arm in _arms(member)]
    if get_origin(hint) is Literal:
        return [Literal[value] for value in get_args(hint)]
    return [hint]


def _as(value: Any, arm: Any, at: str, reader: Reader) -> Any:
    """The value as this type, or UNFIT."""
    kind, inner = get_origin(arm) or arm, get_args(arm)
    if kind is Literal:
        return value if type(value) is type(inner[0]) and value == inner[0] else UNFIT
    if inner and isinstance(value, list | tuple) and kind in (tuple, list, Sequence):
        return _sequence(value, kind, inner, at, reader)
    if inner and isinstance(value, Mapping) and kind in (dict, Mapping):
        return {key: fit(item, inner[1], f"{at}.{key}", reader) for key, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return kind(**read_fields(value, kind, at, reader, at))
    return _plain(value, kind)


def _sequence(value: Sequence[Any], kind: Any, inner: tuple[Any, ...], at: str, reader: Reader) -> Any:
    hints = inner if kind is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
    if len(hints) != len(value):
        return UNFIT
    items = (fit(item, hint, f"{at}[{i}]", reader) for i, (item, hint) in enumerate(zip(value, hints, strict=True)))
    return list(items) if kind is list else tuple(items)


def read_fields(given: Mapping[str, Any], kind: Any, at: str, reader: Reader, owner: str) -> dict[str, Any]:
    """The values of a dataclass's fields.

    Args:
        at: where the values stand, for messages.
        reader: as in `fit`.
        owner: what has an unknown key, or lacks one, in messages.
    """
    known, hints = [field for field in fields(kind) if field.init], get_type_hints(kind)
    check_keys(given, [field.name for field in known], owner)
    required = [field.name for field in known if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        has = f"; it has {', '.join(given)}" if given else ""
        raise ValueError(f"{owner} needs {', '.join(missing)}, which it was not given{has}")
    return {key: fit(value, hints[key], f"{at}.{key}", reader) for key, value in given.items()}


def _plain(value: Any, kind: Any) -> Any:
    """A number, a string, None, or an object that already has the type."""
    if kind is Any:
        return value
    if isinstance(value, bool):
        return value if kind is bool else UNFIT
    if _too_large(value):
        return UNFIT
    if kind is float and isinstance(value, int):
        return value
    if isinstance(kind, type) and issubclass(kind, PurePath) and isinstance(value, str):
        return value
    return value if isinstance(kind, type) and isinstance(value, kind) else UNFIT


def _too_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= LARGEST


def _name(arm: Any) -> str:
    if get_origin(arm) is Literal:
        return repr(get_args(arm)[0])
    return arm.__name__ if isinstance(arm, type) and not get_args(arm) else str(arm).replace("typing.", "")


def check_keys(given: Any, known: Any, where: str) -> None:
    """Raises ValueError for an unknown key; the message names the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no option {shown(key)}: {nearest(key, known)}")


def nearest(word: object, known: Any) -> str:
    """The end of an error message: what may have been meant, and all that is known."""
    known = list(known)
    close = " or ".join(map(repr, get_close_matches(str(word)[:MOST_SHOWN], known, 3, 0.5)))
    return f"{f'did you mean {close}? ' if close else ''}known: {', '.join(known) or 'none'}"


# Places.


def is_hub_id(path: str) -> bool:
    """Whether this can be a model on the Hub, and is not a file or folder on this machine."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None and ".." not in path
    return named and not os.path.exists(path)


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file in a cascade's folder, whose documents may only name what is inside.

    A snapshot in the Hub's cache consists of links to the `blobs` beside `snapshots`; these count as inside.

    Raises:
        ValueError: it, or anything below it, lies outside, also by a symbolic link.
    """
    root = Path(os.path.realpath(folder))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]

    def leads_out(path: Path) -> bool:
        return not any(Path(os.path.realpath(path)).is_relative_to(one) for one in roots)

    found = folder / name
    if Path(name).is_absolute() or leads_out(found):
        raise ValueError(f"{shown(name)} lies outside the cascade's folder; give a relative path inside it")
    if out := next(filter(leads_out, found.rglob("*") if found.is_dir() else ()), None):
        raise ValueError(
            f"{str(out.relative_to(folder))!r} is a link to a place outside the cascade's folder; put the file "
            "itself there"
        )
    return found
