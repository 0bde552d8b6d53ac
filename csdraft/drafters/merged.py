"""Merged: several drafters draft for the same text, and the target reads all their drafts as one tree.

SpecInfer's merge (arXiv 2305.09781): where one drafter fails, another may be right. A token that several drafters
chose after the same tokens becomes one node. Use it with cheap drafters beside a model, or with small models that were
trained separately. The times of all drafters add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft, DraftProbs, Kind
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.drafters._check_parts import check_parts

__all__ = ["Merged"]


@dataclass(frozen=True)
class Merged(Drafter):
    """Merges the drafts of its drafters into one tree.

    Equal chosen tokens become one node. Drawn tokens stay separate nodes, each with its own distribution. Draws of
    several drafters can be in one tree only if all are independent ("iid"). A following drafter continues from the end
    of the first drafter's likeliest branch.

    Args:
        drafters: a verifier tries the first one's tokens first.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", tuple(self.drafters))
        check_parts(self)
        if not self.drafters:
            raise ValueError("drafters=() of a Merged drafter must be one at least")

    @property
    def depth(self) -> int:  # type: ignore[override]
        return max(drafter.depth for drafter in self.drafters)

    def width(self, depth: int) -> int:
        return sum(drafter.width(depth) for drafter in self.drafters)

    def sizes(self) -> Sequence[int]:
        """The sizes of the drafter that has the most sizes, plus the fixed width of the others."""
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
        nodes = Nodes.of(context.draft)
        places = [nodes.take(draft, len(context.draft)) for draft in drafts]
        return nodes.draft(len(context.draft), places[0][drafts[0].tip])

    def _check_draws(self, context: Context, drafts: Sequence[Draft]) -> None:
        """Raises ValueError if siblings drawn dependently would be mixed with another drafter's draws."""
        old, kinds = len(context.draft), {}
        for drafter, draft in zip(self.drafters, drafts, strict=True):
            if draft.probs is not None and any(row is not None for row in draft.probs.rows[old:]):
                kinds[drafter] = draft.probs.kind if draft.has_drawn_siblings else "iid"
        if len(kinds) > 1 and (odd := [drafter for drafter, kind in kinds.items() if kind != "iid"]):
            other = next(drafter for drafter in kinds if drafter is not odd[0])
            raise ValueError(
                f"{_name(odd[0])} draws siblings as {kinds[odd[0]]!r}, {_name(other)} as {kinds[other]!r}; draws of "
                "several drafters stand in one tree only if all are 'iid': use the tree Sampled, or one that chooses"
            )


def _name(drafter: Drafter) -> str:
    tree = getattr(drafter, "tree", None)
    return type(drafter).__name__ + (f" with a {type(tree).__name__} tree" if tree is not None else "")


@dataclass
class Nodes:
    """The tree while it is built: the columns of a `Draft`, and (parent, token) -> node for chosen tokens."""

    tokens: list[int]
    parents: list[int]
    levels: list[int]
    confidence: list[float]
    draft_probs: list[Tensor | None]
    kinds: set[Kind] = field(default_factory=set)
    chosen: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, draft: Draft) -> Nodes:
        draft_probs = draft.probs.rows if draft.probs is not None else (None,) * len(draft)
        return cls(
            list(draft.tokens), list(draft.parents), list(draft.levels), list(draft.confidence), list(draft_probs)
        )

    def take(self, draft: Draft, start: int) -> dict[int, int]:
        """Adds the nodes of `draft` from `start` on; returns the new number of each of its nodes."""
        places = {node: node for node in range(ROOT, start)}
        for node in range(start, len(draft)):
            probs = draft.probs.rows[node] if draft.probs is not None else None
            key = places[draft.parents[node]], draft.tokens[node]
            place = self.chosen.get(key) if probs is None else None
            if place is None:
                place = len(self.tokens)
                self.tokens.append(key[1])
                self.parents.append(key[0])
                self.levels.append(draft.levels[node])
                self.confidence.append(draft.confidence[node])
                self.draft_probs.append(probs)
                if probs is None:
                    self.chosen[key] = place
            places[node] = place
        if draft.probs is not None and draft.has_drawn_siblings:
            self.kinds.add(draft.probs.kind)
        return places

    def draft(self, start: int, lead: int) -> Draft:
        """The draft, with the first `start` nodes unchanged; its last node is the end of the branch through `lead`."""
        last = self._end(lead)
        order = list(range(len(self.tokens)))
        if last >= start:
            order.append(order.pop(last))
        places = {ROOT: ROOT} | {node: place for place, node in enumerate(order)}
        pick = lambda values: tuple(values[node] for node in order)  # noqa: E731 - four uses on four lines
        probs = None
        if any(row is not None for row in self.draft_probs):
            probs = DraftProbs(self.kinds.pop() if self.kinds else "iid", pick(self.draft_probs))
        parents = tuple(places[self.parents[node]] for node in order)
        return Draft(pick(self.tokens), parents, pick(self.levels), pick(self.confidence), probs)

    def _end(self, node: int) -> int:
        """A leaf below `node`: follows first children; among drawn ones, the last draw from the first distribution."""
        while below := [child for child, parent in enumerate(self.parents) if parent == node]:
            probs = self.draft_probs[below[0]]
            node = below[0] if probs is None else [child for child in below if self.draft_probs[child] is probs][-1]
        return node
