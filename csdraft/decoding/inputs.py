"""The inputs of a forward: buffers of one shape at fixed addresses, filled in one copy or advanced in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from csdraft.decoding.awaited import Awaited

__all__ = ["Inputs", "Plan", "Shape"]

IDS, POSITIONS, SLOTS, SEES, PATHS = range(5)
"""Rows of the table of an `Inputs`; from PATHS on, the extra slots that a query sees."""


class Shape(NamedTuple):
    """The sizes that a forward's time depends on.

    Attributes:
        rows: batch size.
        queries: tokens read in each row.
        slots: leading slots of the cache that the forward sees.
        deepest: the most extra slots that a query sees (its path in a tree), in forwards of fixed shape.
    """

    rows: int
    queries: int
    slots: int
    deepest: int = 0


@dataclass(frozen=True)
class Plan:
    """One row's part of a forward: its queries, in the order in which they are read.

    A row's slots are dense: slot s holds the text's token at position s, and the nodes of the draft follow.

    Attributes:
        tokens, positions, slots: (queries,) each query's token, its position, and the slot where it is written.
        sees: (queries,) how many leading slots each query sees.
        paths: (queries,) the extra slots that each query sees: its path in the tree, itself included. None if `sees`
            is enough, as in a chain.
        spare: the slot after all used slots; padding is written there.
        length: tokens of the row's text.
        awaited: the last tokens, if they are still on the device; `tokens` has zeros there.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    sees: Sequence[int]
    paths: Sequence[Sequence[int]] | None
    spare: int
    length: int = 0
    awaited: Awaited | None = None

    @classmethod
    def idle(cls, used: int) -> Plan:
        """The plan of a row that needs nothing: one token after the used slots, which sees only itself."""
        return cls((0,), (0,), (used,), (0,), ((used,),), used + 1)

    @property
    def deepest(self) -> int:
        """The most extra slots that a query sees."""
        return max(map(len, self.paths)) if self.paths else 0

    def only(self, queries: Sequence[int]) -> Plan:
        """The plan with only these queries."""
        known = self.tokens if self.awaited is None else [*self.tokens[: -len(self.awaited)], *self.awaited]
        tokens, positions, slots, sees = (
            [values[query] for query in queries] for values in (known, self.positions, self.slots, self.sees)
        )
        paths = None if self.paths is None else [self.paths[query] for query in queries]
        # In a chain, the slots after the last query are not written yet: a forward without a mask must not see them.
        spare = self.spare if paths and any(paths) else slots[-1] + 1
        return Plan(tokens, positions, slots, sees, paths, spare, self.length)


class Inputs:
    """The inputs of a forward of `rows` x `queries` tokens, each of which sees up to `deepest` extra slots.

    Short rows are padded on the left. A padding query has position `reach`, is written to the row's spare slot, and
    sees only that slot.

    Attributes:
        ids, positions, slots, sees: (rows, queries) int64 views of one buffer; see `Plan`.
        paths: (rows, queries, deepest) int64; short paths are filled up with the query's own slot. None if `deepest`
            is 0.
        end: how many leading slots contain everything that is written or seen.
        seen_by_all: a number of leading slots that every query sees; it may be too low.
        features: (rows, queries, width) what a drafting head reads beside its tokens; None for other models.
    """

    features: Tensor | None = None

    def __init__(self, rows: int, queries: int, deepest: int, device: torch.device):
        shape = (PATHS + deepest, rows, queries)
        self._host = torch.zeros(shape, dtype=torch.long, device="cpu")  # (5 + deepest, rows, queries)
        self._table = self._host.numpy()  # shares its memory
        self._there = self._host if device.type == "cpu" else torch.zeros(shape, dtype=torch.long, device=device)
        # On a CPU, single numbers of a small table are changed fastest without torch or NumPy.
        self._numbers = self._table.reshape(-1).data if self._there is self._host else None
        self.ids, self.positions, self.slots, self.sees = self._there[:PATHS]
        self.paths = self._there[PATHS:].permute(1, 2, 0) if deepest else None  # (rows, queries, deepest)
        self.end = self.seen_by_all = 0

    def load(self, plans: Sequence[Plan], reach: int = 0) -> None:
        """Fills the buffers with one plan for each row, in one copy to the device.

        Args:
            reach: the position of padding queries.
        """
        table, self.end = self._table, 0
        self.seen_by_all = min(min(plan.sees) for plan in plans)
        for row, plan in enumerate(plans):
            pad = table.shape[2] - len(plan.tokens)
            self.end = max(self.end, plan.spare + (pad > 0))
            if pad:
                self.seen_by_all = 0
                table[:, row, :pad] = plan.spare
                table[IDS, row, :pad], table[POSITIONS, row, :pad], table[SEES, row, :pad] = 0, reach, 0
            table[:PATHS, row, pad:] = plan.tokens, plan.positions, plan.slots, plan.sees
            if self.paths is not None:
                table[PATHS:, row, pad:] = table[SLOTS, row, pad:]
                for query, path in enumerate(plan.paths or (), pad):
                    table[PATHS : PATHS + len(path), row, query] = path
        self._send()
        self._fetch([plan.awaited for plan in plans])

    def give(self, source: Callable[[Inputs], Tensor] | None) -> None:
        """Sets `features` to what `source` computes from these inputs; after the first time, at the same address."""
        if source is None:
            return
        if self.features is None:
            self.features = source(self)
        else:
            self.features.copy_(source(self))

    def advance(self, tokens: Tensor | Sequence[int], last: int) -> None:
        """Moves on to the next step of a chain in every row.

        Args:
            tokens: (rows,) the next tokens, on the device or on the host.
            last: the model's last position.
        """
        self.put(tokens)
        if (numbers := self._numbers) is None:
            self._there[POSITIONS:].add_(1)
        else:
            for i in range(POSITIONS * len(tokens), len(numbers)):
                numbers[i] += 1
        self.end += 1
        if self.end > last + 1:  # no position is above its slot
            self.positions.clamp_(max=last)

    def put(self, tokens: Tensor | Sequence[int]) -> None:
        """Replaces the (rows,) tokens of inputs with one query."""
        if self._numbers is None or isinstance(tokens, Tensor):
            self.ids[:, 0] = torch.as_tensor(tokens, device=self.ids.device)  # (rows,)
        else:
            for row, token in enumerate(tokens):
                self._numbers[row] = token

    def _fetch(self, drafts: Sequence[Awaited | None]) -> None:
        """Copies tokens that are still on the device to the end of each row; all at once where one chain drew them."""
        first = drafts[0]
        if first is not None and all(d is not None and d.is_row_of(first, row) for row, d in enumerate(drafts)):
            self.ids[:, -len(first) :] = first.choices.tokens[: len(first), : len(drafts)].T  # (rows, drafted)
            return
        for row, draft in enumerate(drafts):
            if draft is not None:
                self.ids[row, -len(draft) :] = draft.on_device

    def _send(self) -> None:
        if self._there is not self._host:
            # A new pinned copy each time: the table may be filled again before the device has read it.
            sent = self._host.pin_memory() if self._there.is_cuda else self._host
            self._there.copy_(sent, non_blocking=self._there.is_cuda)
