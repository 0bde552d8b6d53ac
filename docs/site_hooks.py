"""What the site's builder does not do by itself: links to files outside docs/, and the notebook as a page.

Pages link to files of the repository as they do on GitHub, such as `../recipes/smol/README.md`. Each file that is
linked becomes a part of the site below `repository/`: a Markdown file as a page, any other file as it is. A link to a
file that does not exist is left as it is, and the build, which is strict, fails on it.
"""

import json
import os
import posixpath
import re
from pathlib import Path

from properdocs.config.defaults import ProperDocsConfig
from properdocs.structure.files import File, Files, InclusionLevel
from properdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
NOTEBOOK, NOTEBOOK_PAGE = ROOT / "docs" / "quickstart.ipynb", "quickstart_notebook.md"
REPOSITORY = "repository/"


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == "docs/quickstart.ipynb":
        return NOTEBOOK_PAGE
    return path.removeprefix("docs/") if path.startswith("docs/") else REPOSITORY + path


def in_repository(uri: str) -> str:
    """The inverse of `in_site`."""
    return uri.removeprefix(REPOSITORY) if uri.startswith(REPOSITORY) else f"docs/{uri}"


def linked(path: str, text: str) -> list[str]:
    """Files of the repository that the page at `path` links to."""
    found = (posixpath.normpath(posixpath.join(posixpath.dirname(path), m["path"])) for m in LINK.finditer(text))
    return [file for file in found if (ROOT / file).is_file()]


def notebook_page() -> str:
    """The notebook as Markdown: code in fenced blocks, outputs as they were stored."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text" in output or "text/html" not in data:
                plain = "".join(output.get("text", data.get("text/plain", "")))
                picture = "".join(data.get("image/svg+xml", ""))
                parts.append(f"<div>{picture}</div>" if picture else f"```text\n{plain.rstrip()}\n```")
            else:
                parts.append(re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])))
    return "\n\n".join(parts)


def on_files(files: Files, config: ProperDocsConfig) -> Files:
    """Adds the notebook's page and the files of the repository that pages link to."""
    if (notebook := files.get_file_from_path("quickstart.ipynb")) is not None:
        files.remove(notebook)
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_page()))
    waiting = [in_repository(file.src_uri) for file in files.documentation_pages()]
    waiting.remove(f"docs/{NOTEBOOK_PAGE}")
    while waiting:
        path = waiting.pop()
        for file in linked(path, (ROOT / path).read_text(encoding="utf-8")):
            if files.get_file_from_path(in_site(file)) is None:
                made = File.generated(config, in_site(file), content=(ROOT / file).read_bytes())
                made.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(made)
                waiting += [file] if file.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: ProperDocsConfig, files: Files) -> str:
    """Points links to files of the repository at their place in the site."""
    path = in_repository(page.file.src_uri)

    def moved(match: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))
        if not (ROOT / file).is_file():
            return match[0]
        return os.path.relpath(in_site(file), posixpath.dirname(page.file.src_uri) or ".") + (match["anchor"] or "")

    return LINK.sub(moved, markdown)
