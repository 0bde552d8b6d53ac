"""The architecture, read off the source: who may import whom, and what a method file looks like."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "csdraft"
FILES = sorted(PACKAGE.rglob("*.py"))

Graph = dict[str, set[str]]
"""Names, each with those that it imports."""

FAMILIES = {"drafters": "drafter", "trees": "tree", "verifiers": "verifier", "schedules": "schedule"}
"""Folders of methods: one file each, no shared edit."""

MAY_IMPORT = {
    "decoding": {"decoding"},
    "drafters": {"drafters", "trees", "decoding", "heads", "tables"},
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
        "drafters",
        "schedules",
        "spec",
        "tables",
        "hub",
        "progress",
    },
}
"""Folder -> folders of csdraft it may import from. A folder that is missing here may import all but `cli`."""

ANYWHERE = {"stored", "version"}
"""Files that import nothing of csdraft, which any folder may use."""

EXCEPTIONS = {
    "drafters/vertical.py": {"verifiers"},  # a vertical cascade reviews, and a review needs a rule
}

OUTSIDE = {"benchmarks", "examples", "recipes", "scripts", "tests"}
"""Packages of the repository that the wheel does not have."""

LONGEST_FUNCTION, LONGEST_FILE = 60, 400


MOST_LINES, MOST_CODE = 28_750, 18_600
"""Of the wheel: all lines, and those that are not blank, comment or docstring. The aim is 15,000 and 11,000."""

SAID = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Every dotted name a file imports, wherever in the file; `from a import b` counts as `a.b`."""
    return imported_by(parsed(path), name_of(path))


def imported_by(tree: ast.AST, name: str, typing_too: bool = True) -> set[str]:
    """What a piece of code imports; without `typing_too` not what only a type checker reads."""
    found = set()
    if isinstance(tree, ast.Import):
        found |= {alias.name for alias in tree.names}
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, f"{name}:{tree.lineno}: relative import; write csdraft.…"
        found |= {f"{tree.module}.{alias.name}" for alias in tree.names}
    inside = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.If) and not typing_too and ast.unparse(tree.test) == "TYPE_CHECKING":
        inside = tree.orelse
    return found.union(*(imported_by(node, name, typing_too) for node in inside))


def module_graph() -> Graph:
    """Each module of csdraft with those that it imports when it runs, also inside functions."""
    paths = {".".join(("csdraft", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph: Graph = {name: set() for name in paths}
    for name, path in paths.items():
        for wanted in imported_by(parsed(path), name_of(path), typing_too=False):
            while wanted and wanted not in paths:  # a name of a module
                wanted = wanted.rpartition(".")[0]
            if wanted and wanted != name:
                graph[name].add(wanted)
    return graph


def folder_graph(modules: Graph) -> Graph:
    """Each folder of csdraft, and each file that is in none, with those that it imports."""
    graph: Graph = {}
    for name, wanted in modules.items():
        folder = name.split(".")[:2][-1]
        graph.setdefault(folder, set()).update({other.split(".")[:2][-1] for other in wanted} - {folder})
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """The groups in which each member imports every other, directly or by way of more."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return [list(group) for group in sorted(groups) if group]


def folders_imported(path: Path) -> set[str]:
    """The parts of csdraft that a file imports: folder names, or file names of the top level."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("csdraft.")}


def names_used(path: Path) -> set[str]:
    """Every identifier of a file: names, attributes, imported names. Comments and docstrings do not count."""
    used = {part for name in imports(path) for part in name.split(".")}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    return used


def method_files() -> list[Path]:
    return [path for family in FAMILIES for path in sorted((PACKAGE / family).glob("*.py")) if path.stem[0] != "_"]


def exported(path: Path) -> list[str] | None:
    """What `__all__` of a file says; None if it has none."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_folder_imports_what_it_may(path):
    folder = name_of(path).split("/")[0]
    allowed = MAY_IMPORT.get(folder)
    if allowed is not None:
        allowed = allowed | ANYWHERE | EXCEPTIONS.get(name_of(path), set())
        assert folders_imported(path) <= allowed


def test_what_any_folder_may_use_imports_nothing():
    assert not [name for name in ANYWHERE if folders_imported(PACKAGE / f"{name}.py")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_imports_what_is_outside_the_wheel_nor_cli(path):
    assert not [name for name in imports(path) if name.split(".")[0] in OUTSIDE]
    if name_of(path).split("/")[0] != "cli":
        assert "cli" not in folders_imported(path)


def test_no_circles_between_modules():
    """Also inside functions: an import that hides there only puts the circle off. Types alone make none."""
    assert circles(module_graph()) == []


def test_no_circles_between_folders():
    assert circles(folder_graph(module_graph())) == []


def test_circles_are_found():
    """Direct ones, those of more members, two at once; and not what only leads into one."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    found = circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e", "a"}, "e": {"d"}, "f": {"e"}})
    assert found == [["a", "b", "c"], ["d", "e"]]
    function = "def f():\n    from csdraft.cascade import x\nif TYPE_CHECKING:\n    import csdraft.hook\n"
    assert imported_by(ast.parse(function), "here", typing_too=False) == {"csdraft.cascade.x"}
    graph = {"csdraft.a.x": {"csdraft.b.y"}, "csdraft.b.y": set(), "csdraft.b.z": {"csdraft.a.x"}}
    assert circles(graph) == []
    assert circles(folder_graph(graph)) == [["a", "b"]]


def test_exceptions_are_still_needed():
    """An exception nobody uses is a rule nobody checks."""
    for name, folders in EXCEPTIONS.items():
        assert folders <= folders_imported(PACKAGE / name)


def test_only_the_hook_touches_generation_mixin():
    assert [name_of(path) for path in FILES if "GenerationMixin" in names_used(path)] == ["hook.py"]


def test_only_the_cache_file_touches_the_caches_of_transformers():
    """No other file names transformers' cache module or one of its classes."""

    def touches(path: Path) -> bool:
        return any(
            name.startswith("transformers") and ("cache_utils" in name or name.endswith("Cache"))
            for name in imports(path)
        )

    assert [name_of(path) for path in FILES if touches(path)] == ["decoding/cache.py"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_hasattr(path):
    """Asking an object what it is hides which interface was meant."""
    assert "hasattr" not in names_used(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(path):
    assert not path.read_text(encoding="utf-8") or ast.get_docstring(parsed(path))


@pytest.mark.parametrize("path", method_files(), ids=name_of)
def test_a_method_file_exports_one_name_and_is_called_like_it(path):
    names = exported(path)
    assert names is not None
    assert len(names) == 1
    # The family's name may be added where the bare word would be confusing: model.py holds ModelDrafter.
    assert snake_case(names[0]) in (path.stem, f"{path.stem}_{FAMILIES[path.parent.name]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_lists_its_methods_nowhere(family):
    """The folder is the register: an `__init__.py` with names in it would be a second one."""
    init = PACKAGE / family / "__init__.py"
    assert not init.exists() or not parsed(init).body


def lines_of_code(text: str) -> int:
    """Lines with something on them that runs: not blank, not comment, not a string that stands by itself."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SAID:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def test_lines_of_code_are_counted():
    said = ['"""What', 'for."""', "", "ONE = 1  # why", '"""Of something."""', "# more", "def two():", '    """It."""']
    text = "\n".join([*said, '    return """', "", '"""', ""])
    assert lines_of_code(text) == 5


def test_the_wheel_is_small():
    """What grows it must take something else away, or be worth a new bar."""
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    assert sum(len(text.splitlines()) for text in texts) <= MOST_LINES
    assert sum(map(lines_of_code, texts)) <= MOST_CODE


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_and_files_are_short(path):
    """Long means two ideas; the docstring is not counted."""
    tree = parsed(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"
