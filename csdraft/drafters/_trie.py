"""Merges token sequences with common beginnings into one tree."""

from __future__ import annotations

from collections.abc import Iterable

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context

__all__ = ["Trie"]


class Trie:
    """A tree under construction, numbered as a `Draft`."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, tokens: Iterable[int], node: int = ROOT) -> int:
        """Adds the new part of a sequence below `node`; returns the node where the sequence ends."""
        children = self._children
        for token in tokens:
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
        return node

    def below(self, context: Context, best: int, level: int) -> Draft:
        """The context's draft with this tree below its tip. Its last node is `best`, or a leaf below `best`."""
        tokens, parents, tip = self.tokens, self.parents, context.tip
        for node in range(best + 1, len(tokens)):  # the newest child of the newest child, and so on
            if parents[node] == best:
                best = node
        if best != len(tokens) - 1:
            tokens = [*tokens[:best], *tokens[best + 1 :], tokens[best]]
            above = [parent - (parent > best) for parent in parents]
            parents = [*above[:best], *above[best + 1 :], above[best]]
        if tip != ROOT:
            parents = [tip + 1 + parent for parent in parents]
        return context.draft.attach(tokens, parents, level)
