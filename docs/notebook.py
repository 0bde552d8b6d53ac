"""Run the cells of docs/quickstart.ipynb and store what they show, there or in another file.

    python docs/notebook.py

Needs no Jupyter. A cell shows what it prints and the value of its last line: as HTML where the value has
`_repr_html_`, a figure of matplotlib as SVG, anything else by `repr`. An exception in a cell ends the run.
"""

import argparse
import ast
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).resolve().parent / "quickstart.ipynb"
Json = dict[str, Any]


def run(cells: list[Json]) -> None:
    """Runs the code cells in order, in one namespace, and replaces their outputs."""
    space: Json = {"__name__": "__main__"}
    number = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            number += 1
            cell["execution_count"] = number
            cell["outputs"] = outputs("".join(cell["source"]), f"cell {number} of {NOTEBOOK.name}", space)


def outputs(source: str, name: str, space: Json) -> list[Json]:
    """What a cell prints, and then the value of its last line, if that is an expression with a value."""
    body, printed, value = ast.parse(source), io.StringIO(), None
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(body, name, "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)
    found: list[Json] = []
    if text := printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": lines(text)})
    if value is not None:
        found.append({"output_type": "display_data", "metadata": {}, "data": shown(value)})
    return found


def shown(value: Any) -> dict[str, list[str]]:
    """A value in every form that it has, by MIME type."""
    forms = {"text/plain": lines(repr(value))}
    if (html := getattr(value, "_repr_html_", lambda: None)()) is not None:
        forms["text/html"] = lines(html)
    if isinstance(value, Figure):
        drawn = io.StringIO()
        value.savefig(drawn, format="svg", metadata={"Date": None})
        forms["image/svg+xml"] = lines(drawn.getvalue()[drawn.getvalue().index("<svg") :])
    return forms


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="where to store (default: in the notebook)")
    out = parser.parse_args().out
    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "csdraft", "svg.fonttype": "none"}  # equal figures give equal files
    sys.path.insert(0, str(NOTEBOOK.parent.parent))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run(notebook["cells"])
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
