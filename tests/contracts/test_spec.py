"""Methods as JSON: every method of every family comes back as it was, and what is not understood is refused."""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from torch import nn

import csdraft
from csdraft import spec
from csdraft.decoding.interfaces import Drafter
from csdraft.tables.bigram import BigramTable
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.documents import DocumentTable
from tests.tiny import drafter_of, tiny

METHODS = [(family, name) for family in spec.FAMILIES for name in spec.types(family)]


OTHER = {"threshold": 0.9, "rule": "chow"}
"""Options whose legal values have to be known."""
REQUIRED = {
    "lengths": (4, 6),
    "corpus": CorpusIndex.build([[3, 4, 5, 3, 4]]),
    "documents": DocumentTable([[3, 4, 5]]),
    "tokenizer": "models/smol-target",
    "target_tokenizer": "models/smol-drafter",
}


def other(value: Any, hint: Any, name: str) -> Any:
    """A legal option value that is not the default."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float) and 0 < value < 1:  # a share or a probability
        return value / 2
    if isinstance(value, int | float):
        return value + 1
    if value is None and int in spec._leaves(hint):
        return 7
    return "other" if isinstance(value, str) else value


def required(hint: Any, name: str) -> Any:
    """A value for an option that has no default."""
    leaves = spec._leaves(hint)
    if nn.Module in leaves:
        return drafter_of("llama")
    if Drafter in leaves:
        many = "tuple" in str(hint)
        return (csdraft.MaxGram(3), csdraft.ModelDrafter(tiny("llama"))) if many else csdraft.MaxGram(depth=4)
    if name in REQUIRED:
        return REQUIRED[name]
    raise AssertionError(f"give the test a value for {name}: {hint}")


def made(family: str, name: str, changed: bool) -> Any:
    """A method with its defaults, or with none of them."""
    method = spec.find(family, name)
    hints, options = get_type_hints(method), {}
    for field in fields(method):
        if field.init and field.default is MISSING and field.default_factory is MISSING:
            options[field.name] = required(hints[field.name], field.name)
        elif (
            field.init and changed and not (name == "token_recycling" and field.name in ("depth", "nodes"))
        ):  # its most
            options[field.name] = other(field.default, hints[field.name], field.name)
    return method(**options)


def same(a: Any, b: Any) -> bool:
    """Equal, models by identity: some methods compare by identity themselves."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b) and not isinstance(a, BigramTable):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.init)
    return a is b if isinstance(a, nn.Module) else a == b


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "options"])
@pytest.mark.parametrize(("family", "name"), METHODS)
def test_round_trip(family, name, changed):
    method = made(family, name, changed)
    models: dict[str, nn.Module] = {}
    tables: dict[str, Any] = {}
    text = json.dumps(spec.to_json(method, spec.Names(models, tables)))
    assert same(spec.from_json(family, json.loads(text), spec.Names(models, tables)), method)
    assert spec.type_of(method) == (family, name)
    assert list(json.loads(text))[1:] == [f.name for f in fields(method) if f.init]  # all options, always


def test_a_nest_and_a_model_used_twice():
    """One model, one name; two models of one name, two."""
    small, twin = drafter_of("llama"), tiny("llama")
    nest = csdraft.Horizontal(
        (
            csdraft.Vertical(small, csdraft.MaxGram(), lenience=2.0),
            csdraft.ModelDrafter(small),
            csdraft.ModelDrafter(twin),
        ),
        (5, 3, 2),
    )
    models: dict[str, nn.Module] = {}
    written = json.loads(json.dumps(spec.to_json(nest, spec.Names(models, {}))))
    assert models == {"LlamaForCausalLM": small, "LlamaForCausalLM-2": twin}
    assert written["drafters"][0]["reviewer"] == written["drafters"][1]["model"] == "LlamaForCausalLM"
    back = spec.from_json("drafters", written, spec.Names(models))
    assert same(back, nest)


def test_a_table_is_written_as_a_file_name(tmp_path):
    table = BigramTable.build([[3, 4, 5, 3, 4]], 10)
    tables: dict[str, Any] = {}
    written = spec.to_json(csdraft.MaxGram(bigram=table), spec.Names({}, tables))
    assert written["bigram"] == "tables/bigram.safetensors"
    assert tables == {"tables/bigram.safetensors": table}
    assert spec.from_json("drafters", written, spec.Names({}, tables)).bigram is table
    table.save(tmp_path / "bigram.safetensors")
    stored = {"tables/bigram.safetensors": tmp_path / "bigram.safetensors"}
    assert spec.from_json("drafters", written, spec.Names({}, stored)).bigram == table
    with pytest.raises(ValueError, match=r"names 'tables/bigram.safetensors', which does not exist: known: none"):
        spec.from_json("drafters", written, spec.Names({}, {}))


def test_a_name_alone_is_a_type():
    assert spec.from_json("verifiers", "rejection") == spec.find("verifiers", "rejection")()
    nest = spec.from_json("drafters", {"type": "horizontal", "drafters": ["max_gram"], "lengths": [4]})
    assert nest == csdraft.Horizontal((csdraft.MaxGram(),), (4,))
    assert spec.resolve("schedules", {"type": "fixed", "depth": 2}).depth == 2


def test_a_type_is_a_file():
    """The folder is the register, and each file exports one class of its family."""
    for family, name in METHODS:
        assert (Path(csdraft.__file__).parent / family / f"{name}.py").is_file()
        assert issubclass(spec.find(family, name), spec.FAMILIES[family])


@pytest.mark.parametrize(
    ("family", "written", "message"),
    [
        (
            "drafters",
            {"type": "maxgram"},
            r"no drafter of type 'maxgram': did you mean 'max_gram'.*\? known: .*vertical",
        ),
        ("verifiers", "max_gram", r"no verifier of type 'max_gram'.*known: .*match"),
        ("nouns", "match", r"no family 'nouns' of methods: .*drafters"),
        ("drafters", "__init__", r"no drafter of type '__init__'"),
        ("drafters", "os.path", r"no drafter of type 'os.path'"),
        ("drafters", {"type": ["max_gram"]}, r"no drafter of type \['max_gram'\]"),
        ("drafters", {"depth": 3}, r"is not a drafter: give \{'type'"),
        ("drafters", 5, r"5 is not a drafter"),
        ("drafters", {"type": "max_gram", "dept": 3}, r"'max_gram' has no option 'dept': did you mean 'depth'\?"),
        ("schedules", {"type": "heuristic", "_depths": {}}, r"has no option '_depths'"),
        ("drafters", {"type": "max_gram", "depth": "3"}, r"max_gram.depth='3' is a str; it takes int"),
        ("drafters", {"type": "max_gram", "depth": True}, r"max_gram.depth=True is a bool; it takes int"),
        ("drafters", {"type": "max_gram", "depth": None}, r"it takes int"),
        ("schedules", {"type": "fixed", "depth": 2.5}, r"fixed.depth=2.5 is a float; it takes int or NoneType"),
        ("drafters", {"type": "model"}, r"drafter 'model' needs model"),
        ("drafters", {"type": "model", "model": "smal"}, r"model.model names 'smal'.*did you mean 'small'"),
        (
            "drafters",
            {"type": "horizontal", "drafters": [{"type": "max_gram", "depht": 1}], "lengths": [1]},
            r"no option 'depht'",
        ),
    ],
)
def test_what_is_not_understood_is_refused(family, written, message):
    with pytest.raises(ValueError, match=message):
        spec.from_json(family, written, spec.Names({"small": drafter_of("llama")}))


def test_a_class_outside_the_folders_is_refused():
    @dataclass(frozen=True)
    class Mine(Drafter):
        depth: int = 5

    with pytest.raises(ValueError, match=r"Mine .*cannot be written as JSON: .*put the class there"):
        spec.to_json(Mine(), spec.Names({}, {}))
    with pytest.raises(ValueError, match="CascadeDrafter"):
        spec.to_json(csdraft.CascadeDrafter([csdraft.MaxGram()]), spec.Names({}, {}))


def test_a_value_that_json_has_no_word_for_is_refused():
    drafter = csdraft.MaxGram()
    object.__setattr__(drafter, "depth", types.SimpleNamespace())
    with pytest.raises(ValueError, match=r"max_gram.depth, a SimpleNamespace, cannot be written"):
        spec.to_json(drafter, spec.Names({}, {}))
