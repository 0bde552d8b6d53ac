"""What the planner expects against what decoding measures, and its pick against the best of a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from benchmarks.claims import Claim
from benchmarks.measure import measure
from benchmarks.methods import Setup
from csdraft.bench import Cell, Method, Prompt, encode
from csdraft.cascade import CascadeDrafter
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.kmatrix import KMatrix
from csdraft.planner.expect import expect
from csdraft.planner.search import search
from csdraft.planner.trace import measure_drafters
from csdraft.schedules.fixed import Fixed

__all__ = ["EXPECTED", "check_planner"]

EXPECTED = (
    ((4, 0), (0, 0)),
    ((0, 8), (0, 0)),
    ((2, 8), (0, 0)),
    ((1, 16), (0, 0)),
    ((4, 0), (0, 4)),
    ((2, 16), (0, 4)),
    ((6, 8), (0, 2)),
)
"""K matrices of [drafter, MaxGram]: each drafter alone, tails, reviews, both."""
GRID = ((0, 1, 2, 4), (0, 4, 8, 16), (0, 4))
"""Of k[0][0], k[0][1] and k[1][1]: what a patient user would try."""
ERROR, BEHIND = 0.1, 0.95

Rates = dict[KMatrix, float]


def check_planner(
    setup: Setup, prompts: Sequence[Prompt], repetitions: int, progress: Callable[..., None]
) -> tuple[list[Claim], str, dict[str, Any]]:
    """Plans on the prompts, then times on the same: a planner is asked about the texts that it has seen.

    Returns:
        Claims, a table, and figures for the JSON file.
    """
    drafters = [ModelDrafter(setup.drafter), MaxGram()]
    encoded = [encode(setup, [prompt]) for prompt in prompts]
    progress("watching the target", 0.0)
    seen = measure_drafters(setup.target, drafters, encoded, **setup.options)
    pick = search(seen)[0].k_matrix
    progress("timing what was expected", 0.0)
    plain, measured = speeds(setup, EXPECTED, prompts, repetitions, progress)
    expected = {matrix: expect(matrix, seen) for matrix in EXPECTED}
    claims, lines = [], ["| k_matrix | tokens a round expected | speed-up expected | measured | error |"]
    lines.append("|---|---|---|---|---|")
    errors = []
    for matrix in EXPECTED:
        real = measured[matrix] / plain
        errors.append(abs(expected[matrix].speedup / real - 1))
        shown = f"{expected[matrix].tokens_per_round:.2f} | {expected[matrix].speedup:.2f} | {real:.2f}"
        lines.append(f"| {[list(row) for row in matrix]} | {shown} | {errors[-1]:.1%} |")
    near = sum(error <= ERROR for error in errors)
    words = f"expected speed-ups within {ERROR:.0%} of measured, at least 5 of {len(errors)} cascades"
    claims.append(Claim(words, f"{near} of {len(errors)}, largest error {max(errors):.1%}", near, 5))

    grid = [((a, b), (0, c if a else 0)) for a, b, c in product(*GRID) if a or b]
    _, rates = speeds(setup, dict.fromkeys(grid), prompts, 1, progress)
    best = sorted(rates, key=lambda matrix: -rates[matrix])[:3]
    _, again = speeds(setup, dict.fromkeys([pick, *best]), prompts, repetitions, progress)
    share = again[pick] / max(again[matrix] for matrix in best)
    words = f"the planner's pick {[list(row) for row in pick]} against the best of the grid's top three, re-timed"
    claims.append(Claim(words, f"{share:.3f} x", share, BEHIND))
    lines += ["", "tokens/s, re-timed: " + ", ".join(f"{m}: {rate:.0f}" for m, rate in again.items())]
    figures = {str(matrix): vars(value) | {"measured": measured[matrix] / plain} for matrix, value in expected.items()}
    return claims, "\n".join(lines), {"expected": figures, "pick": pick}


def speeds(
    setup: Setup,
    matrices: Iterable[KMatrix],
    prompts: Sequence[Prompt],
    repetitions: int,
    progress: Callable[..., None],
) -> tuple[float, Rates]:
    """Tokens a second of plain `generate` and of each matrix, its whole every round, interleaved."""
    made = {str(matrix): matrix for matrix in matrices}
    cells = [Cell(Method("plain", {}))]
    for name, matrix in made.items():
        cascade = CascadeDrafter([setup.drafter, MaxGram()], k_matrix=matrix)
        cells.append(Cell(Method(name, {"assistant": cascade, "schedule": Fixed()})))
    run = measure(setup, cells, prompts, repetitions, progress, look=False)
    rates = {}
    for cell in cells:
        own = [sample for sample in run.samples if sample.cell == cell.name]
        rates[cell.name] = sum(sample.tokens for sample in own) / sum(sample.seconds for sample in own)
    return rates["plain"], {matrix: rates[name] for name, matrix in made.items()}
