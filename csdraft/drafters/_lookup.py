"""The base of drafters that look up what may follow a text, in a table or in the text itself, without a model.

Also `Trie`, which merges their sequences into a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.stored import kind_of, shown

__all__ = ["Lookup", "Trie", "check_vocabulary", "match_evidence", "until"]

LONG_MATCHES = (2, 4, 8)
"""Each of these lengths that a match reaches raises its evidence by one."""


class Lookup(Drafter):
    """Drafts for one row after another; all drafted tokens are point masses."""

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        drafts, ends = [], contexts[0].call.chooser.stopping.eos
        for context, budget in zip(contexts, budgets, strict=True):
            depth, path = min(budget.depth, budget.room), context.path if context.draft.parents else []
            nothing = depth <= 0 or (path and path[-1] in ends)
            drafts.append(context.draft if nothing else self.look_up(context, path, depth, budget))
        return drafts

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        """The row's draft.

        Args:
            path: `context.path`; it does not end the text.
            depth: the most new tokens in a row, at least 1.
            budget: the row's, for its `size`.
        """
        raise NotImplementedError

    def chain(self, context: Context, tokens: Sequence[int]) -> Draft:
        """The context's draft and `tokens`, up to the first one that ends the text."""
        call = context.call
        return context.draft.extend(until(call.chooser.stopping.eos, tokens), call.level(self))

    def load_option(self, name: str, table: Any) -> None:
        """If the option `name` is a path, replaces it by the table that is stored there.

        Raises:
            ValueError: it is neither a path nor a table, nor None where that is the default.
        """
        given = getattr(self, name)
        if isinstance(given, str | Path):
            object.__setattr__(self, name, table.load(given))
        elif not isinstance(given, table) and given is not getattr(type(self), name, MISSING):
            wanted = f"give csdraft.tables' {table.__name__}, or its path"
            raise ValueError(f"{name}={shown(given)} of {type(self).__name__} is {kind_of(given)}; {wanted}")


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


def check_vocabulary(call: Call, table: str, largest: int, way_out: str) -> None:
    """Raises ValueError if the largest token id of a table is not one of the target's.

    Args:
        table: what the message calls it.
        way_out: for the message: how to get a matching table.
    """
    if largest >= call.vocab:
        raise ValueError(f"{table} has token {largest}, but the target has only {call.vocab} tokens; {way_out}")


def match_evidence(matched: int, least: int = 1) -> int:
    """`Drafter.evidence` for a match of `matched` tokens; 0 if it is empty or shorter than `least`."""
    return 0 if matched < max(least, 1) else 1 + sum(matched >= length for length in LONG_MATCHES)


def until(ends: frozenset[int], tokens: Sequence[int]) -> Sequence[int]:
    """The tokens up to and including the first one that ends a text."""
    if ends.isdisjoint(tokens):
        return tokens
    return tokens[: 1 + next(i for i, token in enumerate(tokens) if token in ends)]
