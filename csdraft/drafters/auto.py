"""Auto: copies, earlier outputs and remembered successors in one tree. For any target, without a model or tuning.

Max-Gram (arXiv 2312.11462), suffix decoding (arXiv 2411.04975) and Token Recycling (arXiv 2408.08696) find different
tokens. `Auto` counts how often each kind of guess was right, drafts the likeliest nodes, and tells the schedule how
many of them it expects to be kept. The default schedule then chooses the size of the tree by cost, or drafts nothing.
`generate(..., assistant="auto")` uses one `Auto` for each target. Its tables outlive the call. If a drafter is saved
beside the target, it drafts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round
from csdraft.decoding.limits import MOST_NODES, check_range
from csdraft.drafters._check_parts import check_parts
from csdraft.drafters._likeliest import LikeliestTree
from csdraft.drafters._lookup import Lookup
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.suffix import Suffix
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.tables.adjacency import KEPT, AdjacencyTable
from csdraft.tables.outputs import OutputTable
from csdraft.tables.rates import SourceRates

__all__ = ["Auto"]

SMALLEST = 3
"""Nodes of the smallest tree that a schedule may choose. With the text's last token, the target reads four tokens."""
TAIL = 7
"""The most nodes after another drafter's draft, which the target must read too."""
LOOKED_AT = 7
"""The evidence is computed from the chances of this many nodes."""
EXPECTED = (0.3, 0.6, 1.0, 1.6)
"""The evidence is how many of these bounds the expected number of right nodes reaches."""
NOTHING = 5
"""The evidence if no token is known to follow."""


@dataclass(frozen=True)
class Auto(Lookup):
    """Drafts the likeliest next tokens, learned from earlier texts of the target.

    Args:
        depth: the most tokens in a row.
        nodes: the most tokens of the tree. With 31, the target reads 32, 16, 8 or 4 tokens.
        remember: whether what it learns outlives the call. Drafts, but never the text, then depend on earlier calls.
        adjacency: remembered successors, or the path of a saved table. None: one table for each target if `remember`,
            kept in memory as long as the target, else an empty table for each call.
        outputs: earlier outputs, or the path of a saved table; None as above.
        drafter: another drafter, which drafts first where that pays. The tree continues from the end of its draft.
    """

    depth: int = 20  # type: ignore[assignment]
    nodes: int = 31
    remember: bool = True
    adjacency: AdjacencyTable | str | Path | None = None
    outputs: OutputTable | str | Path | None = None
    drafter: Drafter | None = None
    nest: Horizontal | None = field(init=False, default=None, repr=False, compare=False)
    """If there is another drafter, a cascade of it and of this `Auto` without it."""

    def __post_init__(self) -> None:
        check_range("an Auto", self, depth=None, nodes=MOST_NODES)
        self.load_option("adjacency", AdjacencyTable)
        self.load_option("outputs", OutputTable)
        if self.drafter is not None:
            check_parts(self)
            object.__setattr__(self, "nest", self._after(self.drafter))

    def _after(self, drafter: Drafter) -> Horizontal:
        alone = Auto(self.depth, self.nodes, self.remember, self.adjacency, self.outputs)
        if isinstance(drafter, Horizontal):
            return Horizontal((*drafter.drafters, alone), (*drafter.lengths, self.depth))
        return Horizontal((drafter, alone), (drafter.depth, self.depth))

    # Methods that also call the other drafter.

    def parts(self) -> Sequence[Drafter]:
        if self.nest is not None:
            return self.nest.drafters
        return () if self.drafter is None else (self.drafter,)

    def stages(self) -> list[tuple[Drafter, int]]:
        return super().stages() if self.nest is None else self.nest.stages()

    def check(self, call: Call) -> None:
        super().check(call)
        if self.nest is None:
            self._recycling(call).check(call)
            self._suffix(call).check(call)

    def observe(self, rounds: Sequence[Round]) -> None:
        super().observe(rounds)
        if self.nest is None:
            call = rounds[0].context.call
            for finished in rounds:
                for tree in self._trees(call, finished.context.row).values():
                    tree.learn(finished.tokens)
            self._recycling(call).observe(rounds)
            if self.remember:
                self._suffix(call).observe(rounds)

    # For the schedule.

    def width(self, depth: int) -> int:
        if self.nest is not None:
            return self.nest.width(depth)
        levels = range(1, min(depth, 4) + 1)  # a node's children are a copy and the successors
        return min(sum((KEPT + 1) ** level for level in levels), self.nodes)

    def sizes(self) -> Sequence[int]:
        halves = [self.nodes >> i for i in range(self.nodes.bit_length())]
        return [size for size in halves if size >= min(SMALLEST, self.nodes)]

    def evidence(self, context: Context) -> int:
        if self.nest is not None:
            return self.nest.evidence(context)
        tree = self._tree(context)
        tree.grow(LOOKED_AT)
        expected = sum(tree.chances[:LOOKED_AT])
        return sum(expected >= least for least in EXPECTED) if tree.tokens else NOTHING

    def expected(self, context: Context, depth: int, size: int) -> tuple[float, int] | None:
        if self.nest is not None:
            return None
        tree = self._tree(context)
        tree.grow(size)
        chances = [chance for chance, deep in zip(tree.chances[:size], tree.depths, strict=False) if deep < depth]
        return sum(chances), len(chances)

    # Drafting.

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return super().propose(contexts, budgets) if self.nest is None else self.nest.propose(contexts, budgets)

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        nodes = min(budget.size or self.nodes, TAIL if path else self.nodes)
        tree = self._tree(context)
        tree.grow(nodes)
        return tree.draft(context, depth, nodes, context.call.level(self))

    # The tables that it searches.

    def _tree(self, context: Context) -> LikeliestTree:
        """The row's tree. The schedule looks at the same tree that is drafted afterwards."""
        call, at = context.call, (len(context.text), tuple(context.path))
        trees = self._trees(call, context.row)
        if at not in trees:
            trees.clear()
            suffix = self._suffix(call)
            matrix, place = self._recycling(call).matrix(call), suffix.place(context)
            trees[at] = LikeliestTree(context, matrix, suffix.table, place, self._rates(call))
        return trees[at]

    def _trees(self, call: Call, row: int) -> dict[tuple, LikeliestTree]:
        """(text length, path) where a tree begins -> the tree. Only the row's last tree is kept."""
        return call.memo((self, LikeliestTree, row), dict)

    def _recycling(self, call: Call) -> TokenRecycling:
        return call.memo((self, TokenRecycling), lambda: TokenRecycling(remember=self.remember, table=self.adjacency))

    def _suffix(self, call: Call) -> Suffix:
        """The drafter that searches the earlier outputs and adds new ones."""
        kept = self.outputs is None and self.remember
        return call.memo((self, Suffix), lambda: Suffix(outputs=OutputTable.of(call.target) if kept else self.outputs))

    def _rates(self, call: Call) -> SourceRates:
        way = call.sampler.greedy, call.chooser.processing.temperature
        return call.memo(
            (SourceRates, self.remember),
            lambda: SourceRates.of(call.target, way) if self.remember else SourceRates(),
        )
