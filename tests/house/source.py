"""Reads csdraft's source: what a file imports, names and exports, and which files import each other in a circle."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "csdraft"
COMMAND = ROOT / "csdraft_command.py"

Graph = dict[str, set[str]]
"""Names, each with those that it imports."""

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Source:
    """A file of csdraft.

    Args:
        name: its path in the package, as in "decoding/loop.py".
        text: what it holds.
    """

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> set[str]:
        """Every dotted name it imports, wherever in the file; `from a import b` counts as `a.b`."""
        return imported_by(self.tree)

    @cached_property
    def parts(self) -> set[str]:
        """The parts of csdraft that it imports: folder names, or file names of the top level."""
        return {name.split(".")[1] for name in self.imports if name.startswith("csdraft.")}

    @cached_property
    def parts_named(self) -> set[str]:
        """The parts that it imports for annotations only."""
        running = {name.split(".")[1] for name in imported_by(self.tree, False) if name.startswith("csdraft.")}
        return self.parts - running

    @cached_property
    def names(self) -> set[str]:
        """Every identifier: names, attributes, imported names. Comments and docstrings do not count."""
        used = {part for name in self.imports for part in name.split(".")}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
        return used

    @property
    def folder(self) -> str:
        """The folder of the package that it is in; the file itself at the top level."""
        return self.name.split("/")[0]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def exported(self) -> list[str] | None:
        """What `__all__` says; None if there is none."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                return ast.literal_eval(node.value)
        return None


def sources() -> list[Source]:
    """All files of the wheel: those of the package, and the command line's arguments beside it."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    paths[COMMAND.name] = COMMAND
    return [Source(name, path.read_text(encoding="utf-8")) for name, path in paths.items()]


def imported_by(tree: ast.AST, typing_too: bool = True) -> set[str]:
    """What a piece of code imports, a leading "." for a relative import; without `typing_too` not what only a type
    checker reads."""
    found = set()
    if isinstance(tree, ast.Import):
        found |= {alias.name for alias in tree.names}
    elif isinstance(tree, ast.ImportFrom):
        found |= {f"{'.' * tree.level}{tree.module or ''}.{alias.name}" for alias in tree.names}
    inside = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.If) and not typing_too and ast.unparse(tree.test) == "TYPE_CHECKING":
        inside = tree.orelse
    return found.union(*(imported_by(node, typing_too) for node in inside))


def module_graph(files: list[Source]) -> Graph:
    """Each module of csdraft with those that it imports when it runs, also inside functions."""
    modules = {".".join(("csdraft", *Path(file.name).with_suffix("").parts)): file for file in files}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: Graph = {name: set() for name in modules}
    for name, file in modules.items():
        for wanted in imported_by(file.tree, typing_too=False):
            while wanted and wanted not in modules:  # a name of a module
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


def lines_of_code(text: str) -> int:
    """Lines with something on them that runs: not blank, not comment, not a string that stands by itself."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def prose(path: Path) -> str:
    """What a person reads in a file: all of a page; the comments, docstrings and messages of a Python file. Blanks and
    ends of lines are single blanks, so that words which follow each other are found across lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        kept = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        text = "\n".join(token.string for token in tokens if token.type in kept)
        text = re.sub(r"""(?<!["'])["']\s+[fr]?["'](?!["'])""", "", text)  # one message in two strings
    return re.sub(r"\s+(#+ )?", " ", text)


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
