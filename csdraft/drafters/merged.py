"""Merged: several drafters draft for the same text, and the target reads all their drafts as one tree.

SpecInfer's merge (arXiv 2305.09781): where one drafter is wrong, another may be right. Use it with cheap drafters
beside a model, or with small models that were trained separately. The times of all drafters add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft, DraftProbs, Kind
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.drafters._check_parts import as_list, check_parts

__all__ = ["Merged"]


@dataclass(frozen=True)
class Merged(Drafter):
    """Merges the drafts of its drafters into one tree.

    If several drafters choose the same token after the same tokens, it becomes one node. Drawn tokens stay separate
    nodes, each with its own distribution. One tree can hold draws of several drafters only if all are independent
    ("iid"). A drafter that comes next continues from its `tip`, on the first drafter's branch.

    Args:
        drafters: a verifier tries the first one's tokens first.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", as_list("drafters", self.drafters))
        check_parts(self)
        if not self.drafters:
            raise ValueError("drafters=() of a Merged drafter is empty; give it at least one")

    @property
    def depth(self) -> int:  # type: ignore[override]
        return max(drafter.depth for drafter in self.drafters)

    def width(self, depth: int) -> int:
        return sum(drafter.width(depth) for drafter in self.drafters)

    def sizes(self) -> Sequence[int]:
        """The sizes of the drafter that has the most of them, plus the fixed width of the other drafters."""
        return [size + self._fixed_width for size in self._sizes]

    @property
    def _sizes(self) -> Sequence[int]:
        return max((drafter.sizes() for drafter in self.drafters), key=len)

    @property
    def _fixed_width(self) -> int:
        return self.width(self.depth) - max(self._sizes, default=0)

    def parts(self) -> Sequence[Drafter]:
        return self.drafters

    def evidence(self, context: Context) -> int:
        return next((drafter.evidence(context) for drafter in self.drafters if not drafter.models()), 0)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        if self._sizes:
            fixed = self._fixed_width
            budgets = [b if b.size is None else replace(b, size=max(b.size - fixed, 1)) for b in budgets]
        apart = [drafter.propose(contexts, budgets) for drafter in self.drafters]
        return [self._merged(context, drafts) for context, *drafts in zip(contexts, *apart, strict=True)]

    def _merged(self, context: Context, drafts: Sequence[Draft]) -> Draft:
        self._check_draws(context, drafts)
        start = len(context.draft)
        nodes, chosen = _nodes(context.draft), {}  # chosen: (parent, token) -> node, for tokens that were not drawn
        for draft in drafts:
            places = {node: node for node in range(ROOT, start)}  # node of the draft -> node of the tree
            for i, (token, parent, level, confidence, probs) in enumerate(_nodes(draft)[start:], start):
                above, new = places[parent], len(nodes)
                places[i] = place = new if probs is not None else chosen.setdefault((above, token), new)
                if place == new:
                    nodes.append((token, above, level, confidence, probs))
        if len(nodes) == start:
            return context.draft
        tokens, parents, levels, confidence, rows = zip(*nodes, strict=True)
        kinds: list[Kind] = [draft.probs.kind for draft in drafts if draft.probs and draft.has_drawn_siblings]
        probs = DraftProbs(kinds[0] if kinds else "iid", rows) if any(row is not None for row in rows) else None
        return Draft(tokens, parents, levels, confidence, probs)

    def _check_draws(self, context: Context, drafts: Sequence[Draft]) -> None:
        """Raises ValueError if siblings that depend on each other would be mixed with another drafter's draws."""
        old, kinds = len(context.draft), {}
        for drafter, draft in zip(self.drafters, drafts, strict=True):
            if draft.probs is not None and any(row is not None for row in draft.probs.rows[old:]):
                kinds[drafter] = draft.probs.kind if draft.has_drawn_siblings else "iid"
        if len(kinds) > 1 and (odd := [drafter for drafter, kind in kinds.items() if kind != "iid"]):
            other = next(drafter for drafter in kinds if drafter is not odd[0])
            raise ValueError(
                f"{_name(odd[0])} draws siblings as {kinds[odd[0]]!r}, {_name(other)} as {kinds[other]!r}; draws of "
                "several drafters can be in one tree only if all are 'iid': use the tree Sampled, or one that chooses"
            )


def _name(drafter: Drafter) -> str:
    tree = getattr(drafter, "tree", None)
    return type(drafter).__name__ + (f" with a {type(tree).__name__} tree" if tree is not None else "")


Node = tuple[int, int, int, float, Tensor | None]
"""(token, parent, level, confidence, distribution), as in a `Draft`."""


def _nodes(draft: Draft) -> list[Node]:
    rows = draft.probs.rows if draft.probs is not None else (None,) * len(draft)
    return list(zip(draft.tokens, draft.parents, draft.levels, draft.confidence, rows, strict=True))
