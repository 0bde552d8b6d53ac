"""CascadeDrafter: a K matrix and a lenience turned into nested vertical and horizontal drafters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule, Verifier
from csdraft.decoding.report import Report
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.vertical import Vertical
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.match import Match

__all__ = ["CascadeDrafter", "as_drafter", "choose_schedule", "choose_verifier"]


class CascadeDrafter(Drafter):
    """Cascade Speculative Drafting (arXiv 2312.11462) as one drafter.

    Args:
        drafters: largest first: models, paths, Hub ids or drafters.
        k_matrix: (n, n) upper triangular increments. Row i is the cascade that reviewer i reviews (0: the target,
            i: `drafters[i-1]`), entry j how many tokens stage j (`drafters[j]`) adds to it. A list is row 0 alone
            (all models draft token by token); a number is that many tokens for every drafter of row 0.
        lenience: >= 1, for inner reviewers only; one number, or one for each drafter model, largest first.
        verifier: the acceptance rule at the target, by name or as an object.
        schedule: how much of the cascade to use each round, by name or as an object.
    """

    def __init__(
        self,
        drafters: Sequence[Any],
        k_matrix: Sequence[Sequence[int]] | Sequence[int] | int = 5,
        lenience: float | Sequence[float] = 1.0,
        verifier: Verifier | str = "match",
        schedule: Schedule | str = "cost_model",
    ):
        self.drafters = tuple(as_drafter(drafter) for drafter in drafters)
        self.k_matrix = check_k_matrix(k_matrix, len(self.drafters))
        self.lenience = lenience
        self.verifier, self.schedule = verifier, schedule
        self.root = build(self.drafters, self.k_matrix, spread_lenience(lenience, self.drafters))
        self.report = Report(calls=0)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.root.depth

    def models(self) -> list[object]:
        return self.root.models()

    def check(self, call: Call) -> None:
        for drafter in self.drafters:  # level numbers in the user's order, largest first
            call.level(drafter.models()[0] if drafter.models() else drafter)
        self.root.check(call)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return self.root.propose(contexts, budgets)

    def observe(self, rounds: Sequence[Round]) -> None:
        self.root.observe(rounds)

    def keep_report(self, report: Report) -> None:
        self.report = report


def check_k_matrix(k_matrix: Any, n: int) -> tuple[tuple[int, ...], ...]:
    """The full (n, n) matrix; ValueError unless it is upper triangular with whole numbers >= 0."""
    if n == 0:
        raise ValueError("a cascade needs at least one drafter; leave assistant= out to decode without")
    if isinstance(k_matrix, int):
        k_matrix = [k_matrix] * n
    rows = [list(row) if isinstance(row, Sequence) else row for row in k_matrix]
    if all(isinstance(row, int) for row in rows):
        rows = [rows] + [[0] * n for _ in range(n - 1)]
    if len(rows) != n or any(not isinstance(row, list) or len(row) != n for row in rows):
        raise ValueError(f"k_matrix={k_matrix} does not fit {n} drafters; give {n} rows of {n} numbers, or one row")
    for i, row in enumerate(rows):
        for j, k in enumerate(row):
            if not isinstance(k, int) or k < 0 or (j < i and k != 0):
                raise ValueError(
                    f"k_matrix[{i}][{j}]={k!r}: entries are whole numbers >= 0, and 0 below the diagonal "
                    "(row i is what reviewer i reviews: drafters i and later)"
                )
    return tuple(tuple(row) for row in rows)


def spread_lenience(lenience: float | Sequence[float], drafters: Sequence[Drafter]) -> list[float]:
    """One number a drafter: the given ones for models, largest first, 1 for statistical drafters."""
    models = [i for i, drafter in enumerate(drafters) if isinstance(drafter, ModelDrafter)]
    given = [float(lenience)] * len(models) if isinstance(lenience, (int, float)) else [float(x) for x in lenience]
    if len(given) != len(models):
        raise ValueError(f"lenience={lenience} has {len(given)} numbers for {len(models)} drafter models; give one each")
    if any(not x >= 1 for x in given):
        raise ValueError(f"lenience={lenience} must be 1 (strict) or more; the papers' l <= 1 is 1/lenience")
    spread = [1.0] * len(drafters)
    for i, value in zip(models, given, strict=True):
        spread[i] = value
    return spread


def build(
    drafters: Sequence[Drafter], k_matrix: Sequence[Sequence[int]], lenience: Sequence[float], row: int = 0
) -> Horizontal:
    """Row `row` of the matrix as a horizontal cascade, whose models review their own rows."""
    stages: list[Drafter] = []
    for j in range(row, len(drafters)):
        drafter = drafters[j]
        below = k_matrix[j + 1] if j + 1 < len(drafters) else ()
        if isinstance(drafter, ModelDrafter) and any(below):
            drafter = Vertical(drafter.network, build(drafters, k_matrix, lenience, j + 1), lenience[j])
        stages.append(drafter)
    return Horizontal(tuple(stages), tuple(k_matrix[row][row:]))


def as_drafter(assistant: Any, target: nn.Module | None = None) -> Any:
    """A drafter from whatever a user may pass: a drafter, a model, a path or Hub id."""
    if assistant is None or isinstance(assistant, Drafter):
        return assistant
    if isinstance(assistant, nn.Module | str):
        return ModelDrafter(assistant)
    raise ValueError(
        f"assistant={assistant!r} is a {type(assistant).__name__}; pass a csdraft.Drafter, a model, or the path or "
        "Hub id of a saved cascade or model"
    )


def choose_verifier(verifier: Verifier | str | None, drafter: Drafter | None) -> Verifier:
    """The user's verifier, the cascade's own, or match."""
    return Match()


def choose_schedule(schedule: Schedule | str | None, drafter: Drafter | None) -> Schedule:
    """The user's schedule, the cascade's own, or the cost model."""
    return schedule if isinstance(schedule, Schedule) else Fixed()
