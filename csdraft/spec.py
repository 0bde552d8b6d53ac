"""Methods as JSON and back: `{"type": "max_gram", ...}`. The file name is the type; the fields are the options.

A method is a dataclass in a file of `csdraft/drafters`, `trees`, `verifiers` or `schedules`, and being there is all
the registration there is. Models and tables are written as names, so that one used twice stays one.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from csdraft.decoding.interfaces import Drafter, Schedule, Tree, Verifier
from csdraft.decoding.names import name_of

__all__ = ["FAMILIES", "check_keys", "find", "from_json", "nearest", "resolve", "to_json", "type_of", "types"]

FAMILIES: dict[str, type] = {"drafters": Drafter, "trees": Tree, "verifiers": Verifier, "schedules": Schedule}
"""Folders of methods, and what their classes derive from."""


@dataclass(frozen=True)
class Names:
    """What names in a JSON document stand for; None: names are left to the methods, as paths or Hub ids."""

    models: MutableMapping[str, nn.Module] | None
    tables: MutableMapping[str, Any] | None


def types(family: str) -> list[str]:
    """The types of a family: the names of its files."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r} of methods: {nearest(family, FAMILIES)}")
    folder = importlib.import_module(f"csdraft.{family}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(family: str, type: str) -> Any:
    """The class of a method; ValueError that names the nearest known type if there is none."""
    if type not in (known := types(family)):
        raise ValueError(f"no {family[:-1]} of type {type!r}: {nearest(type, known)}")
    module = importlib.import_module(f"csdraft.{family}.{type}")
    (name,) = module.__all__
    return getattr(module, name)


def type_of(method: Any) -> tuple[str, str]:
    """(family, type) of a method; ValueError if its class is not the one that its file exports."""
    package, _, type = method.__class__.__module__.rpartition(".")
    family = package.removeprefix("csdraft.")
    if family not in FAMILIES or type not in types(family) or find(family, type) is not method.__class__:
        raise ValueError(
            f"{method.__class__.__qualname__} of {method.__class__.__module__} cannot be written as JSON: a method's "
            f"type is its file's name in csdraft/{{{', '.join(FAMILIES)}}}; put the class there"
        )
    return family, type


def to_json(
    method: Any, models: MutableMapping[str, nn.Module], tables: MutableMapping[str, Any] | None = None
) -> dict[str, Any]:
    """A method and its options, all of them, so that later defaults do not change what was saved.

    Args:
        method: a drafter, tree, verifier or schedule.
        models: by name; the method's models are added.
        tables: by the path of the file that a table should be saved as, relative to the document; they are added too.
    """
    return _method_json(method, Names(models, {} if tables is None else tables))


def _method_json(method: Any, names: Names) -> dict[str, Any]:
    _, type = type_of(method)
    assert is_dataclass(method)
    options = {f.name: _write(getattr(method, f.name), names, f"{type}.{f.name}") for f in fields(method) if f.init}
    return {"type": type, **options}


def from_json(
    family: str,
    spec: str | Mapping[str, Any],
    models: MutableMapping[str, nn.Module] | None = None,
    tables: MutableMapping[str, Any] | None = None,
) -> Any:
    """The method that `spec` describes; ValueError for an unknown type, key or model, and for a wrong kind of value.

    Args:
        family: one of `FAMILIES`.
        spec: a type and options, or a type alone, which is that type with its defaults.
        models: by name; None leaves names to the method, which takes them for paths or Hub ids.
        tables: by name, themselves or the paths to load them from; None as above.
    """
    return _method(family, spec, Names(models, tables))


def _method(family: str, spec: Any, names: Names) -> Any:
    spec = {"type": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ValueError(f"{spec!r} is no {family[:-1]}: give {{'type': ..., options}} with one of {types(family)}")
    method, where = find(family, spec["type"]), f"{family[:-1]} {spec['type']!r}"
    known = [f for f in fields(method) if f.init]
    options = {key: value for key, value in spec.items() if key != "type"}
    check_keys(options, [f.name for f in known], where)
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - options.keys()):
        given = f"; it has {', '.join(sorted(options))}" if options else ""
        raise ValueError(f"{where} needs {', '.join(missing)}, which it was not given{given}")
    hints = get_type_hints(method)
    return method(**{k: _read(v, _leaves(hints[k]), names, f"{spec['type']}.{k}") for k, v in options.items()})


def resolve(family: str, method: Any) -> Any:
    """A method given by name, as JSON, or as an object."""
    if isinstance(method, FAMILIES[family]):
        return method
    if isinstance(method, str | Mapping):
        return from_json(family, method)
    raise ValueError(
        f"{family[:-1]}={method!r} is a {type(method).__name__}; give an object, or a name of {types(family)}"
    )


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError for a key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}: {nearest(key, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: what may have been meant, and all there is."""
    known = list(known)
    close = " or ".join(map(repr, get_close_matches(str(word), known, 3, 0.5)))
    return f"{f'did you mean {close}? ' if close else ''}known: {', '.join(known) or 'none'}"


def _write(value: Any, names: Names, where: str) -> Any:
    if isinstance(value, nn.Module):
        return _enter(value, names.models, name_of(value), "{}")
    if _is_table(value.__class__):
        return _enter(value, names.tables, value.__class__.__module__.rpartition(".")[2], "tables/{}.safetensors")
    if isinstance(value, tuple(FAMILIES.values())):
        return _method_json(value, names)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, tuple | list):
        return [_write(item, names, where) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{where}, a {type(value).__name__}, cannot be written as JSON: options are numbers, strings, models, tables "
        "and methods, and sequences of them; what a method can load by itself, such as a tokenizer, give it as a path "
        "or Hub id"
    )


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__.startswith("csdraft.tables.")


def _enter(value: Any, names: MutableMapping[str, Any] | None, stem: str, pattern: str) -> str:
    """The value's name, under which it is entered if it is new."""
    assert names is not None
    for name, known in names.items():
        if known is value:
            return name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
    name, number = pattern.format(stem), 1
    while name.lower() in (known.lower() for known in names):  # some file systems do not tell cases apart
        number += 1
        name = pattern.format(f"{stem}-{number}")
    names[name] = value
    return name


def _leaves(hint: Any) -> list[Any]:
    """The types inside an annotation: `tuple[Drafter, ...] | None` -> Drafter and NoneType; a Literal's values."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    inner = [arg for arg in get_args(hint) if arg is not Ellipsis]
    return [leaf for arg in inner for leaf in _leaves(arg)] if inner else [hint]


def _read(value: Any, leaves: list[Any], names: Names, where: str) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_read(item, leaves, names, where) for item in value)
    classes = [leaf for leaf in leaves if isinstance(leaf, type)]
    family = next((f for f, base in FAMILIES.items() if any(issubclass(c, base) for c in classes)), None)
    if family is not None and isinstance(value, str | Mapping):
        return _method(family, value, names)
    if isinstance(value, str):
        known = names.models if any(issubclass(c, nn.Module) for c in classes) else None
        known = names.tables if any(map(_is_table, classes)) else known
        if known is not None:
            if value not in known:
                raise ValueError(f"{where} names {value!r}, which is not there: {nearest(value, known)}")
            return known[value]
    if not any(_fits(value, leaf) for leaf in leaves):
        wanted = " or ".join(leaf.__name__ if isinstance(leaf, type) else repr(leaf) for leaf in leaves)
        raise ValueError(f"{where}={value!r} is a {type(value).__name__}; it takes {wanted}")
    return value


def _fits(value: Any, leaf: Any) -> bool:
    if not isinstance(leaf, type):
        return leaf is Any or value == leaf
    if isinstance(value, bool):
        return leaf is bool
    return (
        isinstance(value, leaf)
        or (leaf is float and isinstance(value, int))
        or (issubclass(leaf, PurePath) and isinstance(value, str))
    )
