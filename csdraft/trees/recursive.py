"""Recursive: children drawn without replacement by Gumbel-top-k, as many a node as its level says.

RSD-C, recursive speculative decoding with constant branching (arXiv 2402.14160). No node is wasted on a token that a
sibling has: the usual choice for trees under independent draws, with the verifier `WithoutReplacement`. Branch where
the drafter is unsure, near the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from csdraft.trees._branching import Branching

__all__ = ["Recursive"]


@dataclass(frozen=True)
class Recursive(Branching):
    """Draws a node's children without replacement, in the order of their perturbed log probabilities.

    Args:
        branching: children of the root, of each of its children, and so on; further levels have one each.
    """

    draws: ClassVar = "without_replacement"

    branching: tuple[int, ...] = (3, 2)
