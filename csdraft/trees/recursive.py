"""Recursive: children drawn without replacement by Gumbel-top-k, with a fixed number of children on each level.

RSD-C, recursive speculative decoding with constant branching (arXiv 2402.14160). No node is wasted on a token that a
sibling already has. This is the usual tree under independent draws, with the verifier `WithoutReplacement`. Branch
near the root, where the drafter is unsure.
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
        branching: children of the root, of each of its children, and so on; on deeper levels a node has one child.
    """

    draws: ClassVar = "without_replacement"
