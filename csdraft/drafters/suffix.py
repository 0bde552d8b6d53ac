"""Suffix decoding: drafts what most often followed the text's last tokens, here and in earlier outputs; no model.

SuffixDecoding (arXiv 2411.04975). A longer match drafts more; drafting stops where the continuations disagree. Use it
where outputs resemble their inputs or each other: agents, code edits, extraction, the same prompt many times.
`max_gram` is simpler and drafts to any depth. With an `OutputTable`, suffix decoding also learns from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Round
from csdraft.decoding.limits import MOST_NODES, check_range, halvings
from csdraft.drafters._history import history
from csdraft.drafters._lookup import Lookup, check_vocabulary, match_evidence
from csdraft.tables.outputs import OutputTable, Place
from csdraft.tables.speculation import NOTHING, Rule

__all__ = ["Suffix"]


@dataclass(frozen=True)
class Suffix(Lookup):
    """Proposes the most frequent continuation of a match in the text or the earlier outputs, by expected tokens.

    A match of n tokens allows factor * n + offset drafted tokens. The chance of a token is its parent's chance times
    its share of the tokens that followed its parent. All tokens are point masses.

    Args:
        depth: the most tokens in a row, unless a schedule or a cascade says otherwise.
        factor, offset: how many drafted tokens a match allows.
        min_prob: the least chance of a drafted token.
        nodes: the most tokens of a tree; None drafts chains.
        outputs: an `OutputTable`, or the path of a saved one: it is searched, and every finished text is added. With
            None, only the call's own text is searched.
    """

    depth: int = 16  # type: ignore[assignment]
    factor: float = 1.0
    offset: float = 0.0
    min_prob: float = 0.1
    nodes: int | None = None
    outputs: OutputTable | str | Path | None = None

    def __post_init__(self) -> None:
        check_range("a Suffix", self, depth=None, **({} if self.nodes is None else {"nodes": MOST_NODES}))
        if not 0 <= self.factor < inf or not 0 < self.min_prob <= 1 or not isfinite(self.offset):
            raise ValueError(
                f"factor={self.factor}, offset={self.offset} and min_prob={self.min_prob} of a Suffix: factor must be "
                "0 or more, min_prob above 0 and at most 1"
            )
        self.load_option("outputs", OutputTable)

    @property
    def table(self) -> OutputTable | None:
        """The earlier outputs that it searches."""
        return self.outputs if isinstance(self.outputs, OutputTable) else None

    def check(self, call: Call) -> None:
        if self.table is not None:
            check_vocabulary(call, "the table of outputs", self.table.largest, "keep one table for each tokenizer")

    def width(self, depth: int) -> int:
        return depth if self.nodes is None else self.nodes

    def sizes(self) -> Sequence[int]:
        return () if self.nodes is None else halvings(self.nodes)

    def evidence(self, context: Context) -> int:
        matched = history(context).automaton.matched
        if self.table is not None:
            matched = max(matched, self.table.match(context.text.tokens, self.place(context)))
        return match_evidence(matched)

    def place(self, context: Context) -> Place:
        """How far the row's text was matched with the table."""
        return context.call.memo((Place, id(self.outputs), context.row), Place)

    def look_up(self, context: Context, path: list[int], depth: int, budget: Budget) -> Draft:
        nodes = self.nodes and min(budget.size or self.nodes, self.nodes)
        ends = context.call.chooser.stopping.eos
        rule = Rule(self.factor, self.offset, self.min_prob, depth, nodes, ends)
        known = history(context)
        found = rule.best(known.automaton, *known.find(path))
        if self.table is not None:
            earlier = self.table.speculate(context.text.tokens, rule, path, self.place(context))
            found = max(found, earlier, key=lambda one: one.score)
            if found is not NOTHING and max(found.tokens) >= context.call.vocab:
                return context.draft
        if found.parents is None:
            return context.draft.extend(found.tokens, context.call.level(self))
        return context.draft.graft(found.tokens, found.parents, context.call.level(self))

    def observe(self, rounds: Sequence[Round]) -> None:
        """Adds each text that has ended to the table, once."""
        if self.table is None:
            return
        for finished in rounds:
            context = finished.context
            if finished.verdict.ended and not finished.level:
                taken = context.call.memo((OutputTable, id(self.table)), set)
                if context.row not in taken:
                    taken.add(context.row)
                    self.table.add(context.text.new_tokens + finished.tokens)
