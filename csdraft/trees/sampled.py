"""Sampled: children drawn independently from the drafter's distribution, with a fixed number on each level.

The trees of SpecInfer (arXiv 2305.09781) and of multi-candidate speculative decoding (arXiv 2401.06706), verified by
recursive rejection or K-SEQ. The same token may be drawn twice; `Recursive` avoids that. Use this tree to compare with
the literature, or to put the draws of several drafters into one tree (`Merged`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from csdraft.trees._branching import Branching

__all__ = ["Sampled"]


@dataclass(frozen=True)
class Sampled(Branching):
    """Draws each child independently.

    Args:
        branching: children of the root, of each of its children, and so on; on deeper levels a node has one child.
    """

    draws: ClassVar = "iid"
