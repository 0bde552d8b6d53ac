"""Lenient acceptance: a reviewing drafter also keeps tokens that it finds plausible enough.

Cascade Speculative Drafting (arXiv 2312.11462, section 3). Use it for inner levels under coupled or greedy draws,
where a target still checks the result: more of a cheap draft passes in one forward, and the only risk is less
acceptance at the target. Not lossless above 1; at 1 it is `Match`. Leviathan et al. (arXiv 2211.17192) write the same
idea as a factor l <= 1 on the draft probability; lenience = 1 / l.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import ScoresView
from csdraft.decoding.sampling import Sampler
from csdraft.stored import shown
from csdraft.verifiers.match import Match

__all__ = ["Lenient"]

MOST = 1e9
"""Every token passes long before this; above it, products of float32 probabilities could be infinite."""


def check_lenience(lenience: Any) -> None:
    """Raises ValueError unless it is a number, or several numbers, from 1 (strict) to `MOST`."""
    given = lenience if isinstance(lenience, Iterable) else [lenience]
    if not all(isinstance(value, Real) and not isinstance(value, bool) and 1 <= value <= MOST for value in given):  # type: ignore[operator]
        raise ValueError(
            f"lenience={shown(lenience)} must be 1 (strict) or more, at most {MOST:.0e}; the papers' l <= 1 is "
            "1/lenience"
        )


@dataclass(frozen=True)
class Lenient(Match):
    """Accepts a node that carries the reviewer's token, else the first sibling it finds plausible (see the module).

    Args:
        lenience: >= 1; how many times lower than the drafter's confidence the reviewer's may be. 1 is strict.
        level: the reviewer's level; each level has its own uniform random number at a position.
    """

    lenience: float = 1.0
    level: int = 0

    def __post_init__(self) -> None:
        check_lenience(self.lenience)

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.lenience == 1

    @property
    def reads_confidence(self) -> bool:  # type: ignore[override]
        return self.lenience > 1

    def keeps(self, draft: Draft, node: int, scores: ScoresView, sampler: Sampler) -> int | None:
        """The child with the reviewer's token, else the first with u * confidence <= lenience * reviewer's softmax."""
        chosen = super().keeps(draft, node, scores, sampler)
        if chosen is not None or self.lenience == 1:
            return chosen
        uniform = sampler.level_uniform(scores.row, scores.position(node), self.level)
        for child in draft.children(node):
            confidence = draft.confidence[child]
            if math.isnan(confidence):  # a point mass
                continue
            if uniform * confidence <= self.lenience * scores.soft(node, draft.tokens[child]):
                return child
        return None
