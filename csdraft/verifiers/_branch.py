"""Shared by rules that first choose a branch and then accept it."""

from __future__ import annotations

from collections.abc import Callable

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import ScoresView, Verdict

__all__ = ["accept_branch"]


def accept_branch(draft: Draft, scores: ScoresView, root: int, end: int, draw: Callable[[], int]) -> Verdict:
    """Accepts the nodes from `root` down to `end`, or to a token that ends the text; `draw` gives the next token."""
    accepted, node = [], root
    for kept in draft.path(end)[draft.depth(root) :]:
        accepted.append(kept)
        if scores.ends(node, draft.tokens[kept]):
            return Verdict(accepted, None, True)
        node = kept
    token = draw()
    return Verdict(accepted, token, scores.ends(node, token))
