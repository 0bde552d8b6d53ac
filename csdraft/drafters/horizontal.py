"""Horizontal cascade: the best drafter writes the first tokens of a draft, cheaper drafters write the later ones.

Cascade Speculative Drafting (arXiv 2312.11462, section 3.2): a draft's first tokens are the likeliest to be kept, so
they deserve the most expensive drafter. The last tokens are nearly free if a statistical drafter writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.drafters._check_parts import as_list, check_parts

__all__ = ["Horizontal"]


@dataclass(frozen=True)
class Horizontal(Drafter):
    """Lets each drafter in turn lengthen the draft up to its limit.

    If a stage drafts more than it was asked for, because of a reviewer's own token, later stages draft less. If it
    drafts less, they draft more. After a tree, the next stage continues from its `tip`.

    Args:
        drafters: best first.
        lengths: tokens that each is asked to add. A stage ends at the sum of the lengths up to its own.
    """

    drafters: tuple[Drafter, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", as_list("drafters", self.drafters))
        object.__setattr__(self, "lengths", as_list("lengths", self.lengths))
        check_parts(self)
        if len(self.drafters) != len(self.lengths) or min(self.lengths, default=0) < 0:
            raise ValueError(
                f"lengths={list(self.lengths)} for {len(self.drafters)} drafters; give each drafter one number >= 0"
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        return sum(self.lengths)

    def stages(self) -> list[tuple[Drafter, int]]:
        return list(zip(self.drafters, accumulate(self.lengths), strict=True))

    def width(self, depth: int) -> int:
        width = 0
        for drafter, length in zip(self.drafters, self.lengths, strict=True):
            width, depth = width + drafter.width(min(length, depth)), max(depth - length, 0)
        return width

    def parts(self) -> Sequence[Drafter]:
        return self.drafters

    def evidence(self, context: Context) -> int:
        return next((drafter.evidence(context) for drafter in self.drafters if not drafter.models()), 0)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call, drafts = contexts[0].call, [context.draft for context in contexts]
        outermost = call.memo(Horizontal, lambda: self)  # the first to draft in a call
        call.ledger.cut += sum(max(self.depth - budget.depth, 0) for budget in budgets)
        ends = call.chooser.stopping.eos  # nothing follows a draft that ends the text
        limits = [[min(limit, b.depth) for limit in accumulate(self.lengths)] for b in budgets]
        for stage, drafter in enumerate(self.drafters):
            if self.lengths[stage] == 0 or stage < budgets[0].skip:
                continue
            asked = {}
            for i, (context, draft, budget) in enumerate(zip(contexts, drafts, budgets, strict=True)):
                grown = draft.depth(draft.tip) - context.draft.depth(context.tip)
                wanted, room = limits[i][stage] - grown, min(budget.room, self.depth) - grown
                if wanted > 0 and room > 0 and not ends.intersection(draft.tokens[len(context.draft) :]):
                    start = context.after(draft) if grown else context
                    size = budget.size if stage == budget.skip else None  # meant for the first stage that drafts
                    asked[i] = start, replace(budget, depth=min(wanted, room), room=room, skip=0, size=size)
            if asked:
                began = call.ledger.mark() if self is outermost else None
                before = sum(draft.depth(draft.tip) for draft in drafts)
                stage_contexts, stage_budgets = zip(*asked.values(), strict=True)
                for i, draft in zip(asked, drafter.propose(stage_contexts, stage_budgets), strict=True):
                    drafts[i] = draft
                grown = max(sum(draft.depth(draft.tip) for draft in drafts) - before, 0) / len(asked)
                if began is not None:
                    call.ledger.charge(drafter, began, call.ledger.mark(), grown)
        return drafts
