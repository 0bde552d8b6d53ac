"""Merges token sequences with common beginnings into one tree."""

from __future__ import annotations

from collections.abc import Iterable

from csdraft.decoding.draft import ROOT

__all__ = ["Trie"]


class Trie:
    """A tree under construction, numbered as for `Draft.graft`. Add the likeliest sequence first: see `Draft.tip`."""

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
