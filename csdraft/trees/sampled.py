"""Sampled: children drawn independently from the drafter's distribution, as many a node as its level says.

The trees of SpecInfer (arXiv 2305.09781) and of multi-candidate speculative decoding (arXiv 2401.06706), judged by
recursive rejection or K-SEQ. The same token may be drawn twice, which `Recursive` avoids: use this one to compare with
the literature, or where several drafters' draws go into one tree (`Merged`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from csdraft.trees._branching import Branching

__all__ = ["Sampled"]


@dataclass(frozen=True)
class Sampled(Branching):
    """Draws each child anew.

    Args:
        branching: children of the root, of each of its children, and so on; further levels have one each.
    """

    draws: ClassVar = "iid"

    branching: tuple[int, ...] = (3, 2)
