"""The pages do what they say: python blocks run, commands exist, links lead somewhere, the table is fresh."""

import io
import json
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import picture
from benchmarks.__main__ import main as benchmarks
from csdraft.cli import main
from csdraft.data.generate import GenerateArguments
from csdraft.trainers.distill import DistillArguments
from recipes.smol.pretrain import PretrainArguments
from tests import forked
from tests.house.page_process import run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES += [*sorted(ROOT.glob("recipes/*/README.md")), *sorted(ROOT.glob("models/*/README.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
MODELS = [ROOT / "models" / "smol-target", ROOT / "models" / "smol-drafter"]

ARGUMENTS = {"generate_data.py": GenerateArguments, "pretrain.py": PretrainArguments}
ARGUMENTS |= dict.fromkeys(("distill_drafter.py", "training", "arms"), DistillArguments)
"""Whose fields the `key=value` words of a script or a benchmark are."""

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SAVED_AS = re.compile(r"saved as\s+`([^`]+)`", re.I)
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
PREAMBLES = {
    "README.md": (
        "import csdraft\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, drafter = map(AutoModelForCausalLM.from_pretrained, ('models/smol-target', 'models/smol-drafter'))\n"
        "inputs = AutoTokenizer.from_pretrained('models/smol-target')('def main(argv=None):', return_tensors='pt')\n"
        "model.generation_config.max_new_tokens = 16\n"
    )
}
"""What the reader of a page has already, by its name: run before its blocks."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run
    saved_as: str | None  # the file that the reader makes of it


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        above = text[: match.start()].rstrip().rpartition("\n\n")[2]
        saved_as = SAVED_AS.search(above)
        found.append(Block(page, line, match["language"], match["code"], match["reason"], saved_as and saved_as[1]))
    return [block for block in found if block.language == language]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def having(language: str) -> list:
    """The pages with such blocks, as parameters."""
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory that looks like the checkout and may be written to."""
    for name in ("models", "recipes", "scripts"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", having("python"))
@pytest.mark.slow
def test_python_blocks_run(page, folder, tmp_path):
    """All of a page's blocks, in order, in one namespace."""
    wanted = [block for block in blocks(page, "python") if block.reason is None]
    missing = [model.name for model in MODELS if not (model / "config.json").exists()]
    if missing and (name_of(page) in PREAMBLES or any("models/" in block.code for block in wanted)):
        pytest.skip(f"the bundled models {missing} are not there; train them with recipes/smol")
    code = [PREAMBLES.get(name_of(page), ""), *map(as_run, wanted)]
    assert not (wrong := run_page(name_of(page), code, tmp_path / "said")), wrong


def as_run(block: Block) -> str:
    """A block at its line of the page. A block that the reader saves as a file is saved, as a part of the package."""
    code = "\n" * (block.line - 1) + block.code
    if block.saved_as is None:
        return code
    file = Path(block.saved_as)
    package, folder = ".".join(file.parent.parts), str(file.parent)
    return (
        f"import importlib, pathlib; pathlib.Path({folder!r}).mkdir(parents=True, exist_ok=True); "
        f"pathlib.Path({block.saved_as!r}).write_text({code!r}, 'utf-8'); "
        f"importlib.import_module({package!r}).__path__.append({folder!r}); "
        f"importlib.import_module({package + '.' + file.stem!r})"
    )


@pytest.mark.slow
def test_a_block_that_is_saved_does_not_borrow_from_the_page(folder, tmp_path):
    """It has what it imports, as its file would have."""
    page = ROOT / "page.md"
    saved, reads = Block(page, 1, "python", "made = one", None, "csdraft/made.py"), "from csdraft.made import made"
    assert "NameError" in run_page("page", ["one = 1", as_run(saved)], tmp_path / "said")
    alone = Block(page, 1, "python", "made = 1", None, "csdraft/made.py")
    assert not run_page("page", [as_run(alone), reads], tmp_path / "said")


@pytest.mark.slow
def test_a_page_that_fails_is_found(tmp_path):
    """And one page does not see what another has set."""
    said = tmp_path / "said"
    assert "ZeroDivisionError" in run_page("page", ["import csdraft\ncsdraft.mark = 1", "1 / 0"], said)
    assert 'File "page", line 2' in run_page("page", ["\n1 / 0"], said)
    assert run_page("page", ["import sys\nsys.exit(3)"], said)
    assert not run_page("page", ["import csdraft", "assert not getattr(csdraft, 'mark', 0)"], said)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_only_the_hub_excuses_a_block_from_running(page):
    text = page.read_text(encoding="utf-8")
    reasons = re.findall(r"<!-- not run: (.*?) -->", text)
    assert all("Hub" in reason for reason in reasons)
    excused = [match for match in BLOCK.finditer(text) if match["reason"] is not None]
    assert len(excused) == len(reasons)  # each stands right above its block


@pytest.mark.parametrize("page", having("bash"))
def test_commands_exist(page, folder):
    """A line of a bash block names a make target, or a program that knows every option it is given.

    Nothing is done: make runs dry, and programs are asked for --help.
    """
    for block in blocks(page, "bash"):
        if block.reason is None:
            for line in block.code.replace("\\\n", " ").splitlines():
                check_command(shlex.split(line, comments=True), f"{name_of(page)}:{block.line}")


@cache
def help_of(program: str, *words: str) -> str:
    """What a script, or a module and a command, says of itself: in this process, which has imported torch already."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setattr(sys, "argv", [program, *words, "--help"])
        modules = {"csdraft": main, "benchmarks": lambda: benchmarks([*words, "--help"])}
        run = modules.get(program) or partial(runpy.run_path, program, run_name="__main__")
        with pytest.raises(SystemExit) as end:
            run()
    assert not end.value.code, program
    return told.getvalue()


def check_command(words: list[str], where: str) -> None:
    if not words or words[:2] in (["pip", "install"], ["git", "clone"]) or words[0] in ("cd", "source"):
        return
    if words[0] == "make":
        # -o: the installation is taken to be up to date, whatever the times of its files.
        command = ["make", "-n", "-o", ".venv/.installed", "-C", str(ROOT), *words[1:]]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0, f"{where}: {words}"
        return
    if words[0] == "csdraft":
        arguments = words[1:]
        program = ["csdraft", *arguments[:1]]
    elif words[:3] == ["python", "-m", "benchmarks"]:
        arguments = words[3:]
        program = ["benchmarks", *arguments[:1]]
    else:
        assert words[0] in ("python", "accelerate"), f"{where}: this test does not know the command {words[0]!r}"
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        program, arguments = [str(ROOT / words[script])], words[script + 1 :]
    text = help_of(*program)
    for word in arguments:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.split('=')[0])}\b", text), f"{where}: no option {word}"
        elif word.startswith(("recipes/", "scripts/")):
            assert (ROOT / word).exists(), f"{where}: no file {word}"
        elif "=" in word and (arguments_of := ARGUMENTS.get(Path(program[-1]).name)):
            assert word.split("=")[0] in {field.name for field in fields(arguments_of)}, f"{where}: no key {word}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", NOTEBOOK], ids=name_of)
def test_links_lead_somewhere(page):
    """To a file, and to a heading of it. What the site's builder checks too, here without it."""
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        file = (page.parent / link["path"]).resolve() if link["path"] else page
        assert file.exists(), link[0]
        assert link["anchor"] is None or link["anchor"] in anchors(file), link[0]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_named_files_and_names_exist(page):
    """Code spans such as `tests/tiny.py`, `decoding/cache.py` and `csdraft.planner.theory`."""
    text = page.read_text(encoding="utf-8")
    saved_as = set(SAVED_AS.findall(text))  # by the reader
    for span in set(re.findall(r"`(\w[\w./-]*)`", text)) - saved_as:
        folder = span.split("/")[0]
        if "/" in span and ((ROOT / folder).is_dir() or (ROOT / "csdraft" / folder).is_dir()) and folder != "out":
            assert (ROOT / span).exists() or (ROOT / "csdraft" / span).exists(), span
        if re.fullmatch(r"csdraft(\.\w+)+", span):
            assert pydoc.locate(span) is not None, span


def test_the_map_of_the_package_is_right():
    """Each file and folder that CONTRIBUTING.md lists exists, and each folder of the package is listed."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = {name.rstrip("/") for name in re.findall(r"^  (\w+(?:\.py|/)) ", text, re.M)}
    found = {path.name for path in (ROOT / "csdraft").iterdir()}
    folders = {path.name for path in (ROOT / "csdraft").iterdir() if (path / "__init__.py").is_file()}
    assert listed, "no map"
    assert listed <= found
    assert folders <= listed


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    """With the figures that are kept; each method that was measured has a bar, and each kind of token a colour."""
    monkeypatch.chdir(ROOT)
    benchmarks(["picture", "--out", str(tmp_path / "answer.svg")])
    drawn = ElementTree.parse(tmp_path / "answer.svg").getroot()
    texts = {"".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    measured = json.loads((ROOT / picture.KEPT).read_text("utf-8"))["figures"]
    assert {picture.LABELS[f["name"]].replace("`", "") for f in measured if f["name"] != "plain"} <= texts
    colours = {shape.get("fill") for shape in drawn.iter("{http://www.w3.org/2000/svg}rect")}
    assert set(picture.COLOURS) <= colours


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in ROOT.glob("docs/*.md") if f": {page.name}\n" not in text]


@pytest.mark.slow
def test_the_notebook_runs(folder):
    """Its cells in order, by the command that stores their outputs."""
    status, said = forked.run([str(ROOT / "docs" / "notebook.py"), "--out", "fresh.ipynb"], timeout=120)
    assert status == 0, said[-3000:]
    stored, fresh = (json.loads(path.read_text("utf-8"))["cells"] for path in (NOTEBOOK, folder / "fresh.ipynb"))
    assert kinds(stored) == kinds(fresh)  # what is stored is what the cells show
    assert {"stream", "text/html", "image/svg+xml"} <= {kind for cell in kinds(stored) for kind in cell}


def kinds(cells: list[dict]) -> list[list[str]]:
    """What each code cell shows, by kind; AssertionError for an output with nothing in it."""
    shown = []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        forms = [output.get("data") or {"stream": output["text"]} for output in cell["outputs"]]
        assert all("".join(lines).strip() for form in forms for lines in form.values()), cell["source"]
        shown.append(sorted(kind for form in forms for kind in form))
    return shown


def test_the_table_of_methods_is_fresh():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_tables.py", "--check"])
        runpy.run_path(str(ROOT / "docs" / "build_tables.py"), run_name="__main__")  # exits where a page is stale


def test_every_public_name_is_in_the_docs():
    import csdraft

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in csdraft.__all__ if not re.search(rf"\b{name}\b", text)]
