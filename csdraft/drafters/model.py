"""A small language model as drafter: any causal LM or T5-like model that shares the target's vocabulary.

Speculative decoding as in Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318): the drafter writes a
few tokens one by one, KV-cached and batched, and the target checks them all in one forward.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import nn

from csdraft.decoding.call import Call
from csdraft.decoding.chain import draft_chain
from csdraft.decoding.draft import Draft
from csdraft.decoding.feature_session import taps_of
from csdraft.decoding.interfaces import Budget, Context, Drafter, Tree
from csdraft.decoding.limits import check_range, halvings
from csdraft.decoding.tree import draft_tree
from csdraft.heads.on_target import OnTarget
from csdraft.models import check_reviewer, given_model
from csdraft.stored import kind_of

__all__ = ["ModelDrafter"]


@dataclass(frozen=True, eq=False)
class ModelDrafter(Drafter):
    """Drafts token by token with a model of its own, or a tree level by level.

    Args:
        model: a causal LM or T5-like model, a self-drafting adapter, or a path or Hub id to load one from.
        depth: tokens per round, unless a schedule or a cascade says otherwise; levels of a tree.
        tree: how drafts branch (`csdraft/trees`); None drafts chains. A tree ignores the `stop` of a budget.
        name: its name in reports; the model's own name if empty.
    """

    model: nn.Module | str | os.PathLike
    depth: int = 5  # type: ignore[assignment]
    tree: Tree | None = None
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        check_range("a ModelDrafter", self, 1, "; leave the drafter out to draft nothing", depth=None)
        if self.tree is not None and not isinstance(self.tree, Tree):
            raise ValueError(
                f"tree={self.tree!r} of a ModelDrafter is {kind_of(self.tree)}; give an object of "
                "csdraft/trees, such as BestFirst()"
            )
        object.__setattr__(self, "model", given_model(self.model, "model"))

    @property
    def network(self) -> nn.Module:
        """The loaded model."""
        return self.model  # type: ignore[return-value]

    def models(self) -> list[object]:
        return [self.model]

    def taps(self) -> frozenset[int]:
        return taps_of(self.model)

    def check(self, call: Call) -> None:
        check_reviewer(self.network, call)
        call.level(self.network, self.name)

    def width(self, depth: int) -> int:
        return depth if self.tree is None else self.tree.width(depth)

    def sizes(self) -> Sequence[int]:
        chosen = self.tree is not None and self.tree.sized(1) is not self.tree
        return halvings(self.width(self.depth)) if chosen else ()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call = contexts[0].call
        session, level = call.session(self.network), call.level(self.network)
        # At its last position the model stops drafting, and decoding continues without it.
        steps = [min(b.depth, b.room, session.left(c)) for c, b in zip(contexts, budgets, strict=True)]
        if all(wanted <= 0 for wanted in steps):
            return [c.draft for c in contexts]
        confidence = any(b.confidence for b in budgets)
        if self.tree is not None:
            size = budgets[0].size
            tree = self.tree if size is None else self.tree.sized(size)
            return draft_tree(session, tree, contexts, steps, level, confidence)
        drawn = draft_chain(session, contexts, steps, confidence, [b.stop for b in budgets])
        return [
            c.draft.extend(d.tokens, level, d.confidence, d.draft_probs) for c, d in zip(contexts, drawn, strict=True)
        ]


def bound(drafter: Any, target: nn.Module, seen: dict[int, Any] | None = None) -> Any:
    """A copy of `drafter` in which every part that runs on a target's layers runs on those of `target`.

    Returns `drafter` itself if it has no such part.

    Args:
        drafter: a drafter, or a tuple of drafters.
        seen: id of a drafter -> its copy. So a drafter that occurs twice is copied once.

    Raises:
        ValueError: an adapter was trained on another base.
    """
    seen = {} if seen is None else seen
    if isinstance(drafter, OnTarget):
        return drafter.bind(target)
    if isinstance(drafter, tuple):
        parts = tuple(bound(part, target, seen) for part in drafter)
        return drafter if all(a is b for a, b in zip(parts, drafter, strict=True)) else parts
    if not isinstance(drafter, Drafter) or not is_dataclass(drafter):
        return drafter
    if id(drafter) not in seen:
        options = {f.name: getattr(drafter, f.name) for f in fields(drafter)}
        changed = {k: new for k, v in options.items() if (new := bound(v, target, seen)) is not v}
        _ = drafter.memory  # made here, so that all copies share it
        seen[id(drafter)] = copied = copy.copy(drafter) if changed else drafter
        for name, value in changed.items():
            object.__setattr__(copied, name, value)
    return seen[id(drafter)]
