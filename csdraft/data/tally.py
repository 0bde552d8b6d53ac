"""Counts of a source's rows: how many were read, left out (and why), and cut."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from csdraft.data.shards import Part

__all__ = ["Counted", "Tally", "Unusable", "tally_of"]

LONGEST_DETAIL = 160


class Unusable(ValueError):
    """A row cannot be used.

    Args:
        what: the reason; completes "the row has ...", such as "no response". Rows are counted by it.
        detail: about this row alone, such as an error's message.
    """

    def __init__(self, what: str, detail: str = ""):
        super().__init__(f"{what}: {detail}" if detail else what)
        self.what, self.detail = what, " ".join(detail.split())[:LONGEST_DETAIL]


@dataclass
class LeftOut:
    """Rows left out for one reason: how many, the number of the first (from 0), and its detail."""

    rows: int
    first: int
    detail: str = ""


@dataclass
class Tally:
    """Counts from reading a source once.

    Attributes:
        source: its name.
        read: number of rows read.
        left_out: reason -> rows.
        cut: rows that lost the tokens after their first `max_length`. A text split into pieces is not cut.
    """

    source: str
    read: int
    max_length: int | None = None
    cut: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def leave_out(self, number: int, what: str, detail: str) -> None:
        """Counts row `number` of the source as left out; for the others see `Unusable`."""
        self.left_out.setdefault(what, LeftOut(0, number, detail)).rows += 1

    @property
    def reasons(self) -> str:
        """For example "2 have no response, first row 7; 1 has a null conversation, row 31"."""
        return "; ".join(
            f"{reason.rows:,} {'has' if reason.rows == 1 else 'have'} {what}, "
            f"{'' if reason.rows == 1 else 'first '}row {reason.first}{reason.detail and f': {reason.detail}'}"
            for what, reason in self.left_out.items()
        )

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.read:,} {'row' if self.read == 1 else 'rows'} read"]
        if self.left_out:
            parts.append(f"{sum(reason.rows for reason in self.left_out.values()):,} left out ({self.reasons})")
        if self.cut:
            parts.append(f"{self.cut:,} cut to {self.max_length:,} tokens")
        return "; ".join(parts)

    def show(self) -> None:
        """Prints one line to standard error if rows were left out or cut; only a machine's first process does."""
        if (self.left_out or self.cut) and not Part.of_environment().local_rank:
            print(self, file=sys.stderr)

    def described(self) -> dict[str, Any]:
        """For provenance: numbers only, without any of the source's text."""
        left_out = {what: reason.rows for what, reason in self.left_out.items()}
        return {"read": self.read, "left_out": left_out, "cut": self.cut}


class Counted(list):
    """Rows or prompts, with the `tally` of reading them."""

    def __init__(self, items: Iterable[Any], tally: Tally):
        super().__init__(items)
        self.tally = tally


def tally_of(rows: Any) -> Tally | None:
    """The counts of rows or prompts that `csdraft.data.sources` read; None for others."""
    return getattr(rows, "tally", None)
