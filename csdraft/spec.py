"""Converts methods to JSON and back: `{"type": "max_gram", ...}`. The type is the file name, the options are fields.

A method is a dataclass in a file of `csdraft/drafters`, `trees`, `verifiers` or `schedules`; putting the file there
registers it. Models and tables are written as names, so that one that is used twice is still one after loading.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, get_args, get_type_hints

from torch import nn

from csdraft.decoding.interfaces import Drafter, Schedule, Tree, Verifier
from csdraft.decoding.names import name_of
from csdraft.stored import UNFIT, check_keys, is_hub_id, kind_of, naming, nearest, read_fields, shown

__all__ = ["FAMILIES", "Names", "check_keys", "find", "from_json", "nearest", "resolve", "to_json", "type_of", "types"]

FAMILIES: dict[str, type] = {"drafters": Drafter, "trees": Tree, "verifiers": Verifier, "schedules": Schedule}
"""Folder of methods -> their base class."""


@dataclass(frozen=True)
class Names:
    """What the names in a JSON document stand for. None: a method takes the name itself, as a path or Hub id.

    Writing adds to these dictionaries.

    Attributes:
        models: name -> model.
        tables: path of a file in the document's folder -> table, or the path to load it from.
        places: path in the document's folder -> what a method loads itself, such as a tokenizer, or its path.
    """

    models: MutableMapping[str, nn.Module] | None = None
    tables: MutableMapping[str, Any] | None = None
    places: MutableMapping[str, Any] | None = None


def types(family: str) -> list[str]:
    """The types of a family: the names of its files."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r} of methods: {nearest(family, FAMILIES)}")
    folder = importlib.import_module(f"csdraft.{family}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(family: str, type: str) -> Any:
    """The class of a method; for an unknown type, raises a ValueError that names the nearest known one."""
    if type not in (known := types(family)):
        raise ValueError(f"no {family[:-1]} of type {type!r}: {nearest(type, known)}")
    module = importlib.import_module(f"csdraft.{family}.{type}")
    (name,) = module.__all__
    return getattr(module, name)


def type_of(method: Any) -> tuple[str, str]:
    """(family, type) of a method; raises ValueError if its class is not the one that its file exports."""
    package, _, type = method.__class__.__module__.rpartition(".")
    family = package.removeprefix("csdraft.")
    if family not in FAMILIES or type not in types(family) or find(family, type) is not method.__class__:
        raise ValueError(
            f"{method.__class__.__qualname__} of {method.__class__.__module__} cannot be written as JSON: a method's "
            f"type is its file's name in csdraft/{{{', '.join(FAMILIES)}}}; put the class there"
        )
    return family, type


def to_json(method: Any, names: Names) -> dict[str, Any]:
    """A method with all its options, so that a later change of a default does not change what was saved.

    Args:
        method: a drafter, tree, verifier or schedule.
        names: its models, tables and places are added; without `places`, paths of this machine stay as they are.
    """
    _, type = type_of(method)
    assert is_dataclass(method)
    hints, options = get_type_hints(method.__class__), {}
    for field in fields(method):
        if field.init:
            value = getattr(method, field.name)
            place = names.places is not None and _is_place(hints[field.name])
            options[field.name] = _placed(value, names) if place else _write(value, names, f"{type}.{field.name}")
    return {"type": type, **options}


def from_json(family: str, spec: Any, names: Names = Names(), at: str = "") -> Any:
    """The method that `spec` describes.

    Args:
        family: one of `FAMILIES`.
        spec: a type and its options, or a type alone.
        at: the file and key that `spec` was read from; messages begin with it.

    Raises:
        ValueError: an unknown type, key or name, or a value of the wrong type.
    """
    spec = {"type": spec} if isinstance(spec, str) else spec
    prefix = f"{at}: " if at else ""
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ValueError(
            f"{prefix}{shown(spec)} is not a {family[:-1]}: give {{'type': ..., options}} with one of {types(family)}"
        )
    with naming(f"{at}.type") if at else nullcontext():
        method, where = find(family, spec["type"]), f"{prefix}{family[:-1]} {spec['type']!r}"
    options = {key: value for key, value in spec.items() if key != "type"}
    read = read_fields(options, method, at or spec["type"], partial(_named, names, bool(at)), where)
    with naming(at) if at else nullcontext():
        return method(**read)


def resolve(family: str, method: Any) -> Any:
    """A method given by name, as JSON, or as an object."""
    if isinstance(method, FAMILIES[family]):
        return method
    if isinstance(method, str | Mapping):
        return from_json(family, method)
    raise ValueError(f"{family[:-1]}={method!r} is {kind_of(method)}; give an object, or a name of {types(family)}")


def _write(value: Any, names: Names, where: str) -> Any:
    if isinstance(value, nn.Module):
        return _enter(value, names.models, name_of(value), "{}")
    if _is_table(value.__class__):
        return _enter(value, names.tables, value.__class__.__module__.rpartition(".")[2], "tables/{}.safetensors")
    if isinstance(value, tuple(FAMILIES.values())):
        return to_json(value, names)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, tuple | list):
        return [_write(item, names, where) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{where}, {kind_of(value)}, cannot be written as JSON: options are numbers, strings, models, tables "
        "and methods, and sequences of them; give what a method loads itself, such as a tokenizer, as a path or Hub id"
    )


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__.startswith("csdraft.tables.")


def _enter(value: Any, names: MutableMapping[str, Any] | None, stem: str, pattern: str) -> str:
    """The name under which a value is known; a new value is entered."""
    assert names is not None
    for name, known in names.items():
        if known is value:
            return name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
    name, number = pattern.format(stem), 1
    while name.lower() in (known.lower() for known in names):  # some file systems ignore case
        number += 1
        name = pattern.format(f"{stem}-{number}")
    names[name] = value
    return name


def _leaves(hint: Any) -> list[Any]:
    """What an annotation is made of: `tuple[Drafter, ...] | None` -> Drafter and NoneType."""
    inner = [arg for arg in get_args(hint) if arg is not Ellipsis]
    return [leaf for arg in inner for leaf in _leaves(arg)] or [hint]


def _is_place(hint: Any) -> bool:
    """Whether an option names a file or folder that the method loads itself, and not a table."""
    leaves = [leaf for leaf in _leaves(hint) if isinstance(leaf, type)]
    return any(issubclass(leaf, PurePath) for leaf in leaves) and not any(map(_is_table, leaves))


def _placed(value: Any, names: Names) -> str:
    """A Hub id unchanged; for anything else, the folder of the document that it will be saved in."""
    assert names.places is not None
    if isinstance(value, str) and is_hub_id(value):
        return value
    stem = PurePath(value).name if isinstance(value, str | PurePath) else type(value).__name__
    return _enter(value, names.places, stem, "tokenizers/{}")


def _named(names: Names, document: bool, value: Any, arms: Sequence[Any], at: str) -> Any:
    """The method, model, table or place that a value stands for, if one of the types `arms` asks for it."""
    kinds = [arm for arm in arms if isinstance(arm, type)]
    family = next((f for f, base in FAMILIES.items() if any(issubclass(kind, base) for kind in kinds)), None)
    if family is not None and isinstance(value, str | Mapping):
        return from_json(family, value, names, at if document else "")
    if not isinstance(value, str):
        return UNFIT
    if any(map(_is_table, kinds)):
        known, folder = names.tables, "tables"
    elif any(issubclass(kind, nn.Module) for kind in kinds):
        known, folder = names.models, "models"
    elif any(issubclass(kind, PurePath) for kind in kinds):
        known, folder = names.places, "tokenizers"
    else:
        return UNFIT
    if known is None:
        return UNFIT
    if value in known:
        return known[value]
    if folder == "tokenizers" and is_hub_id(value):
        return value
    raise ValueError(f"{at} names {shown(value)}, which does not exist: {nearest(value, known)} ({folder})")
