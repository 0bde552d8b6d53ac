"""The cost table of a saved cascade: seconds of forwards and of drafted tokens, by target and device.

On the same device, a loaded cascade starts from these costs. On other devices the table is kept, but not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from csdraft.decoding.memory import Memory
from csdraft.decoding.states import cost_label
from csdraft.stored import check_keys, naming, path_inside, read_object
from csdraft.tables.costs import Learned, check_costs

__all__ = ["NAME", "load_costs", "save_costs"]

NAME, FORMAT = "tables/costs.json", 1


def save_costs(memory: Memory, folder: Path) -> None:
    """Writes the costs that a drafter has learned or was loaded with. Writes no file if there are none."""
    tables = {at: {tuple(line[:3]): line[3] for line in table} for at, table in memory.saved.items()}
    for target, _, learned in memory.entries():
        if isinstance(learned, Learned):
            found = {(rows, bucket, width): seconds for rows, bucket, width, seconds in learned.costs.to_list()}
            tables.setdefault(cost_label(target), {}).update(found)
    costs = {at: [[*shape, seconds] for shape, seconds in table.items()] for at, table in tables.items()}
    if costs:
        path = folder / NAME
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, "costs": costs}, allow_nan=False) + "\n", encoding="utf-8")


def load_costs(folder: Path) -> dict[str, Any]:
    """The costs of a saved cascade, by target and device; empty if it has none.

    Raises:
        ValueError: the file is not a cost table; the message names the file and the key.
    """
    with naming(NAME):
        path = path_inside(folder, NAME)
    if not path.is_file():
        return {}
    document = read_object(path, NAME)
    check_keys(document, ("format", "costs"), NAME)
    if document.get("format") is True or document.get("format") != FORMAT:
        raise ValueError(
            f"{NAME} has format {document.get('format')!r}, expected {FORMAT}; delete it to measure again"
        )
    return check_costs(document.get("costs"), f"{NAME}: costs")
