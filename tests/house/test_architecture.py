"""The architecture, read off the source: who may import whom, what a method file is, how large things are."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.house.source import (
    PACKAGE,
    Source,
    circles,
    folder_graph,
    imported_by,
    lines_of_code,
    module_graph,
    snake_case,
    sources,
)

FILES = sources()

METHODS = {"drafters": "drafter", "trees": "tree", "verifiers": "verifier", "schedules": "schedule"}
"""Folders of methods: one file each, no shared edit."""

MAY_IMPORT = {
    "decoding": {"decoding"},  # the core: it tells a ledger, and knows no reports
    "reports": {"reports", "decoding"},
    "checks": {"checks", "decoding"},
    "drafters": {"drafters", "trees", "decoding", "heads", "tables", "checks", "models"},
    "trees": {"trees", "decoding", "heads"},
    "verifiers": {"verifiers", "decoding"},
    "schedules": {"schedules", "decoding", "tables"},
    "heads": {"heads", "decoding"},
    "tables": {"tables"},
    "losses": {"losses"},
    "data": {"data"},
    "metrics": {"metrics"},
    # The trainers decode too: on-policy texts, and block efficiency as the training metric.
    "trainers": {
        "trainers",
        "losses",
        "heads",
        "data",
        "metrics",
        "decoding",
        "reports",
        "drafters",
        "schedules",
        "spec",
        "tables",
        "hub",
        "models",
        "card",
        "progress",
    },
}
"""Folder -> folders of csdraft it may import from. A folder that is missing here may import all but `cli`."""

NAMES_ONLY = {"decoding": {"reports"}, "trees": {"reports"}}
"""Folder -> folders that it may name in annotations, and does not import when it runs."""

ANYWHERE = {"amounts", "stored", "version"}
"""Files that import nothing of csdraft, which any folder may use."""

EXCEPTIONS = {
    "drafters/vertical.py": {"verifiers"},  # a vertical cascade reviews, and a review needs a rule
}

OUTSIDE = {"benchmarks", "examples", "recipes", "scripts", "tests"}
"""Packages of the repository that the wheel does not have."""

LONGEST_FUNCTION, LONGEST_FILE = 60, 400

MOST_LINES, MOST_CODE = 32_926, 20_841
"""Of the wheel: all lines, and those that are not blank, comment or docstring. The aim is 15,000 and 11,000."""


# The rules for one file. Each gives what is wrong; `test_every_file_keeps_the_rule` says where.


def imports_what_its_folder_may(file: Source) -> Iterator[str]:
    if file.folder in MAY_IMPORT:
        allowed = MAY_IMPORT[file.folder] | ANYWHERE | EXCEPTIONS.get(file.name, set())
        for part in sorted(file.parts - allowed - (file.parts_named & NAMES_ONLY.get(file.folder, set()))):
            yield f"imports csdraft.{part}; {file.folder} may import {', '.join(sorted(allowed))}"


def imports_nothing_outside_the_wheel(file: Source) -> Iterator[str]:
    for name in sorted(file.imports):
        if name.split(".")[0] in OUTSIDE:
            yield f"imports {name}, which the wheel does not have"


def leaves_the_command_line_alone(file: Source) -> Iterator[str]:
    if file.folder != "cli" and "cli" in file.parts:
        yield "imports csdraft.cli; only the command line may"


def imports_by_full_names(file: Source) -> Iterator[str]:
    for name in sorted(file.imports):
        if name.startswith("."):
            yield f"relative import of {name}; write csdraft.…"


def leaves_generation_mixin_to_the_hook(file: Source) -> Iterator[str]:
    if "GenerationMixin" in file.names and file.name != "hook.py":
        yield "touches GenerationMixin; only hook.py does"


def leaves_the_caches_of_transformers_to_the_cache_file(file: Source) -> Iterator[str]:
    """Neither transformers' cache module nor one of its classes."""
    if file.name != "decoding/cache.py":
        for name in sorted(file.imports):
            if name.startswith("transformers") and ("cache_utils" in name or name.endswith("Cache")):
                yield f"imports {name}; only decoding/cache.py does"


def never_asks_hasattr(file: Source) -> Iterator[str]:
    """Asking an object what it is hides which interface was meant."""
    if "hasattr" in file.names:
        yield "uses hasattr"


def says_what_it_is_for(file: Source) -> Iterator[str]:
    if file.text and not ast.get_docstring(file.tree):
        yield "has no docstring"


def exports_one_name_and_is_called_like_it(file: Source) -> Iterator[str]:
    """The folder's word may be added where the bare word would be confusing: model.py holds ModelDrafter."""
    if file.folder not in METHODS or file.stem.startswith("_"):
        return
    names = file.exported or []
    wanted = (file.stem, f"{file.stem}_{METHODS[file.folder]}")
    if len(names) != 1 or snake_case(names[0]) not in wanted:
        yield f"__all__ is {file.exported}; a method file exports one name that is spelt {' or '.join(wanted)}"


def lists_methods_nowhere(file: Source) -> Iterator[str]:
    """The folder is the register: an `__init__.py` with names in it would be a second one."""
    if file.name in {f"{folder}/__init__.py" for folder in METHODS} and file.tree.body:
        yield "says something; the folder is all the registration there is"


def is_short(file: Source) -> Iterator[str]:
    """Long means two ideas; the docstring of a function is not counted."""
    if (lines := len(file.text.splitlines())) > LONGEST_FILE:
        yield f"has {lines} lines; {LONGEST_FILE} are allowed"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {lines} lines; {LONGEST_FUNCTION} are allowed"


def long_function(lines: int) -> str:
    return "\n".join(["def f():", '    """It."""', *["    f()"] * (lines - 1)])


Rule = Callable[[Source], Iterator[str]]
BROKEN: dict[Rule, list[tuple[str, str]]] = {
    imports_what_its_folder_may: [
        ("decoding/loop.py", "from csdraft.drafters.model import ModelDrafter"),
        ("verifiers/match.py", "def f():\n    import csdraft.drafters"),
        ("drafters/model.py", "import csdraft.verifiers.match"),
        ("decoding/loop.py", "from csdraft.reports.report import Report"),
    ],
    imports_nothing_outside_the_wheel: [("bench.py", "from benchmarks.measure import timed")],
    leaves_the_command_line_alone: [("tune.py", "from csdraft.cli import main")],
    imports_by_full_names: [("tune.py", "from . import hook"), ("decoding/loop.py", "from .draft import Draft")],
    leaves_generation_mixin_to_the_hook: [
        ("tune.py", "import transformers\ntransformers.GenerationMixin.generate = 1"),
        ("cascade.py", "from transformers import GenerationMixin"),
    ],
    leaves_the_caches_of_transformers_to_the_cache_file: [
        ("decoding/session.py", "from transformers import DynamicCache"),
        ("hook.py", "import transformers.cache_utils"),
    ],
    never_asks_hasattr: [("tune.py", "if hasattr(tune, 'x'):\n    pass")],
    says_what_it_is_for: [("tune.py", "# For nothing\nx = 1")],
    exports_one_name_and_is_called_like_it: [
        ("drafters/model.py", "__all__ = ['ModelDrafter', 'Other']"),
        ("trees/pairs.py", "__all__ = ['Couples']"),
        ("schedules/fixed.py", "class Fixed: pass"),
        ("verifiers/match.py", "__all__ = []"),
    ],
    lists_methods_nowhere: [("drafters/__init__.py", "from csdraft.drafters.model import ModelDrafter")],
    is_short: [("tune.py", "x = 1\n" * (LONGEST_FILE + 1)), ("tune.py", long_function(LONGEST_FUNCTION + 1))],
}
"""Each rule for one file, with files that break it."""


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    faults = [f"csdraft/{file.name}: {fault}" for file in FILES for fault in rule(file)]
    assert not faults, f"{rule.__name__}:\n" + "\n".join(faults)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_file_that_breaks_the_rule_is_found(rule: Rule) -> None:
    for name, text in BROKEN[rule]:
        assert list(rule(Source(name, text))), f"{rule.__name__} passes {name}: {text[:80]}"
    assert not list(is_short(Source("tune.py", long_function(LONGEST_FUNCTION)))), "a function of the length allowed"


def test_every_folder_of_methods_was_read() -> None:
    """The rules above have something to say: each folder has files, and those that the rules name exist."""
    read = {file.folder for file in FILES}
    assert set(MAY_IMPORT) <= read
    assert {"hook.py", "decoding/cache.py", *EXCEPTIONS} <= {file.name for file in FILES}
    assert "GenerationMixin" in next(file for file in FILES if file.name == "hook.py").names
    assert len(FILES) > 150


def test_what_any_folder_may_use_imports_nothing() -> None:
    assert not {
        file.name: file.parts for file in FILES if file.stem in ANYWHERE and file.name == file.folder and file.parts
    }
    assert all((PACKAGE / f"{name}.py").is_file() for name in ANYWHERE)


def test_an_exception_that_nobody_needs_is_gone() -> None:
    for file in FILES:
        assert EXCEPTIONS.get(file.name, set()) <= file.parts, f"{file.name} no longer needs its exception"


# Circles.


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also inside functions: an import that hides there only puts the circle off. Types alone make none."""
    assert circles(module_graph(FILES)) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    graph = folder_graph(module_graph(FILES))
    assert sum(map(len, graph.values())) > 50, "no imports were read, so this proves nothing"
    assert circles(graph) == []


def test_circles_are_found() -> None:
    """Direct ones, those of more members, two at once; and not what only leads into one."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    found = circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e", "a"}, "e": {"d"}, "f": {"e"}})
    assert found == [["a", "b", "c"], ["d", "e"]]
    function = "def f():\n    from csdraft.cascade import x\nif TYPE_CHECKING:\n    import csdraft.hook\n"
    assert imported_by(ast.parse(function), typing_too=False) == {"csdraft.cascade.x"}
    files = [
        Source("a/x.py", "import csdraft.b.y"),
        Source("b/y.py", ""),
        Source("b/z.py", "from csdraft.a.x import w"),
    ]
    graph = module_graph(files)
    assert graph == {"csdraft.a.x": {"csdraft.b.y"}, "csdraft.b.y": set(), "csdraft.b.z": {"csdraft.a.x"}}
    assert circles(graph) == []
    assert circles(folder_graph(graph)) == [["a", "b"]]


# Sizes.


def test_lines_of_code_are_counted() -> None:
    said = ['"""What', 'for."""', "", "ONE = 1  # why", '"""Of something."""', "# more", "def two():", '    """It."""']
    text = "\n".join([*said, '    return """', "", '"""', ""])
    assert lines_of_code(text) == 5


def test_the_wheel_is_small() -> None:
    """What grows it must take something else away, or be worth a new bar."""
    lines = sum(len(file.text.splitlines()) for file in FILES)
    code = sum(lines_of_code(file.text) for file in FILES)
    assert lines <= MOST_LINES, f"the wheel has {lines} lines; {MOST_LINES} are allowed"
    assert code <= MOST_CODE, f"the wheel has {code} lines of code; {MOST_CODE} are allowed"
