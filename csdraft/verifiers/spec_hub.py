"""SpecHub: two siblings, one of them always the drafter's likeliest token, verified as a pair by optimal transport.

SpecHub (arXiv 2411.05289): the first token is drawn from the draft distribution. The second is the likeliest token,
the hub; if the hub came first, the second is drawn from the other tokens. So every pair has the hub, and the transport
problem has a closed form. Use it with trees of two children per node. A single draw is verified as by `Rejection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers._stepwise import TINY, Stepwise, drawn_from, left_over, probs_without

__all__ = ["SpecHub"]


@dataclass(frozen=True)
class SpecHub(Stepwise):
    """Gives the target's mass first to the other token of each pair, and what is left to the hub (see the module)."""

    lossless = True  # type: ignore[assignment]
    kinds: ClassVar = frozenset({"pair"})

    def refusal(self, draft: Draft) -> str | None:
        return super().refusal(draft) or not_pairs(draft)

    def tries(
        self, draft: Draft, group: Sequence[int], left: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        draft_probs = drawn_from(draft, group[0])
        assert draft_probs is not None
        draft_probs, hub = draft_probs.to(left), int(draft_probs.argmax())
        tokens = [draft.tokens[child] for child in group]
        hub_second = draft_probs.clone()  # (vocab,) probability of the pair (x, hub); later what is not accepted yet
        hub_second[hub] = 0
        hub_first = draft_probs[hub] * probs_without(draft_probs, [hub])  # (vocab,) the same for (hub, x)
        came_first = tokens[0] == hub
        other, own = (group[1], group[0]) if came_first else (group[0], group[1])
        token = draft.tokens[other]

        offered = float((hub_first if came_first else hub_second)[token])
        rest, hub_second, taken = supply(left, hub_second)
        rest, hub_first, taken_late = supply(rest, hub_first)
        if sampler.accepts(row, float((taken_late if came_first else taken)[token]) / max(offered, TINY)):
            return other, left
        # The hub's own mass goes first to the pairs in which the hub came first.
        wanted = left[hub]  # ()
        first = torch.minimum(wanted, hub_first.sum())  # ()
        second = torch.minimum(wanted - first, hub_second.sum())
        chance = first / hub_first.sum() if came_first else second / hub_second.sum()
        if sampler.accepts(row, float(chance.nan_to_num(0.0))):
            return own, left
        rest[hub] = wanted - first - second
        return None, left_over(rest, left)


def supply(wanted: Tensor, offered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(vocab,) each: `wanted` and `offered` without their common part, and the common part."""
    taken = torch.minimum(wanted, offered)
    return wanted - taken, offered - taken, taken


def not_pairs(draft: Draft) -> str | None:
    """Why the drawn siblings of `draft` are not pairs that hold the likeliest token once; None if they are."""
    if draft.probs is None or not draft.has_drawn_siblings:
        return None
    siblings: dict[int, list[int]] = {}  # parent -> drawn tokens
    all_probs: dict[int, Tensor] = {}
    for token, parent, probs in zip(draft.tokens, draft.parents, draft.probs.rows, strict=True):
        if probs is not None:
            siblings.setdefault(parent, []).append(token)
            all_probs[parent] = probs
    hubs = torch.stack(list(all_probs.values())).argmax(-1).tolist()  # one copy to the host for all pairs
    for tokens, hub in zip(siblings.values(), hubs, strict=True):
        if len(tokens) > 2:
            return f"{len(tokens)} siblings were drawn together, but SpecHub verifies pairs; draw two for each node"
        if len(tokens) == 2 and tokens.count(hub) != 1:
            return f"the pair {tokens} must hold the likeliest token {hub} once; draw with the tree Pairs"
    return None
