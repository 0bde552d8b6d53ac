"""The draft: a tree of tokens proposed to follow a text. It is an immutable value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from csdraft.decoding.awaited import Awaited

__all__ = ["ROOT", "Draft", "DraftProbs", "Kind"]

Kind = Literal["iid", "without_replacement", "pair"]
ROOT = -1
"""The node that stands for the text itself."""

NAN = float("nan")
ROUNDING = 0.02
"""How far the sum of a distribution in half precision may be from 1."""


@dataclass(frozen=True, eq=False)
class DraftProbs:
    """The distributions that the tokens of a draft were actually drawn from.

    Attributes:
        kind: how siblings were drawn: independently, without replacement, or as a coupled pair. A drawn child must not
            be left out because of its token, or because of the tokens below it. If children are drawn independently or
            as a pair, their number must not depend on the tokens drawn before.
        rows: (nodes,) the (vocab,) probabilities for each node, on the model's device; siblings share one tensor. None
            marks a point mass: the token was chosen, not drawn.
    """

    kind: Kind
    rows: tuple[Tensor | None, ...]

    def flaw(self, vocab: int, start: int = 0) -> str | None:
        """Why the rows from `start` on are not distributions over `vocab` tokens; None if they are.

        It takes one reduction and one copy to the host for all rows.
        """
        rows = list({id(row): row for row in self.rows[start:] if row is not None}.values())
        if not rows:
            return None
        for row in rows:
            if not isinstance(row, Tensor) or not row.is_floating_point() or row.shape != (vocab,):
                made = f"{row.dtype} of shape {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                return f"a draft's distribution is {made}, the target's distributions ({vocab},); give probabilities"
        stacked = torch.stack(rows)  # (distinct rows, vocab)
        sums, least = stacked.sum(-1, dtype=torch.float32), stacked.amin(-1)
        found = torch.stack([sums, least.float()]).tolist()  # (2, distinct rows)
        for total, lowest in zip(*found, strict=True):
            if not abs(total - 1) <= ROUNDING or not lowest >= 0:  # also true for nan
                return (
                    f"a draft's distribution sums to {total:.4g}, its least value is {lowest:.4g}; give probabilities"
                )
        return None


@dataclass(frozen=True, eq=False)
class Draft:
    """A tree of tokens proposed to follow the text; a chain is a tree with one branch.

    Nodes are numbered in topological order: `parents[i] < i`, `ROOT` for the children of the text.

    Attributes:
        tokens: (nodes,) token ids; those of a chain may still be on the device, see `Awaited`.
        parents: (nodes,) index of each node's parent.
        levels: (nodes,) the level of the cascade that chose the token (see `Call.level`).
        confidence: (nodes,) softmax probability under the model that chose it; nan for a point mass or when unknown.
        probs: the distributions that the tokens were drawn from; None: all are point masses, which is always safe.
    """

    tokens: tuple[int, ...] | Awaited = ()
    parents: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    confidence: tuple[float, ...] = field(default=(), repr=False)
    probs: DraftProbs | None = field(default=None, repr=False)

    @classmethod
    def chain(cls, tokens: Sequence[int], level: int = 0) -> Draft:
        """A chain of point masses, all of one level."""
        return cls().extend(tokens, level)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        return children

    @cached_property
    def has_drawn_siblings(self) -> bool:
        """Whether some node has two or more drawn children: only then does `DraftProbs.kind` matter."""
        if self.probs is None or self.is_chain:
            return False
        return _branches([p for p, row in zip(self.parents, self.probs.rows, strict=True) if row is not None])

    def children(self, node: int) -> Sequence[int]:
        """The children of `node` (or of `ROOT`) in the order they were proposed."""
        if self.is_chain:
            return (node + 1,) if node + 1 < len(self.tokens) else ()
        return self._children.get(node, ())

    @cached_property
    def _named(self) -> dict[tuple[int, int], int]:
        named: dict[tuple[int, int], int] = {}
        for node, key in enumerate(zip(self.parents, self.tokens, strict=True)):
            named.setdefault(key, node)
        return named

    def child(self, node: int, token: int) -> int | None:
        """The first child of `node` that carries `token`."""
        if self.is_chain:
            below = node + 1
            return below if below < len(self.tokens) and self.tokens[below] == token else None
        return self._named.get((node, token))

    def continues(self, other: Draft) -> bool:
        """Whether this draft is `other`, perhaps with more nodes after it."""
        old = len(other.tokens)
        return self.tokens[:old] == other.tokens and self.parents[:old] == other.parents

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`; empty for `ROOT`."""
        if self.is_chain:
            return list(range(node + 1))
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """(nodes,) 0 for the root's children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    def depth(self, node: int) -> int:
        """Number of draft tokens on the path to `node`: 0 for `ROOT`."""
        return node + 1 if self.is_chain else 0 if node == ROOT else self.depths[node] + 1

    @cached_property
    def tip(self) -> int:
        """The node to continue from: where the branch of first children ends; `ROOT` if the draft is empty."""
        if self.is_chain:
            return len(self.tokens) - 1
        tip = ROOT
        while children := self._children.get(tip):
            tip = children[0]
        return tip

    @property
    def main_branch(self) -> Draft:
        """The chain from the root to `tip`."""
        return self.only(self.path(self.tip))

    def only(self, nodes: Sequence[int]) -> Draft:
        """The chain made of `nodes`, a path from the root."""
        if self.is_chain and len(nodes) == len(self.tokens):
            return self
        pick = lambda values: tuple(values[node] for node in nodes)  # noqa: E731 - three uses on three lines
        probs = self.probs and DraftProbs(self.probs.kind, pick(self.probs.rows))
        parents = tuple(range(ROOT, len(nodes) - 1))
        return Draft(pick(self.tokens), parents, pick(self.levels), pick(self.confidence), probs)

    def extend(
        self,
        tokens: Sequence[int],
        level: int,
        confidence: Sequence[float] | None = None,
        draft_probs: Sequence[Tensor | None] | None = None,
    ) -> Draft:
        """This draft with a chain of `tokens` below its `tip`.

        Args:
            tokens: (new,) token ids.
            level: the level that chose them.
            confidence: (new,) softmax probabilities; nan if not given.
            draft_probs: (new,) the (vocab,) distributions that they were drawn from; point masses if not given.
        """
        old = len(self.tokens)
        return self.attach(tokens, [self.tip, *range(old, old + len(tokens) - 1)], level, confidence, draft_probs)

    def graft(self, tokens: Sequence[int], parents: Sequence[int], level: int) -> Draft:
        """This draft with a tree of point masses below its `tip`; in `parents` the tip is -1, the first new node 0."""
        if old := len(self.tokens):
            parents = [self.tip if parent == ROOT else old + parent for parent in parents]
        return self.attach(tokens, parents, level)

    def continued(self, chain: Draft) -> Draft:
        """This draft with the rest of `chain`, which begins with the main branch, below its `tip`."""
        if self.is_chain:
            return chain
        start, probs = self.depth(self.tip), chain.probs
        rows = None if probs is None else probs.rows[start:]
        whole = self.extend(chain.tokens[start:], 0, chain.confidence[start:], rows)
        return replace(whole, levels=self.levels + chain.levels[start:])

    def attach(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        level: int,
        confidence: Sequence[float] | None = None,
        draft_probs: Sequence[Tensor | None] | None = None,
        kind: Kind = "iid",
    ) -> Draft:
        """This draft with new nodes anywhere in the tree, numbered after its own; other arguments as in `extend`.

        Args:
            parents: (new,) the parent of each: an earlier node of the whole draft, or `ROOT`.
            kind: how siblings were drawn, if `draft_probs` are given. It does not matter for nodes without siblings.
        """
        if not tokens:
            return self
        old, new, probs = len(self.tokens), len(tokens), self.probs
        if probs is not None or draft_probs is not None:
            kinds: set[Kind] = {kind} if draft_probs is not None and _branches(parents) else set()
            if probs is not None and _branches(self.parents):
                kinds.add(probs.kind)
            if len(kinds) > 1:
                raise ValueError(
                    f"a draft must not mix siblings that were drawn in different ways, {sorted(kinds)}; use one kind "
                    "of tree"
                )
            rows = probs.rows if probs is not None else (None,) * old
            rows += (None,) * new if draft_probs is None else tuple(draft_probs)
            probs = DraftProbs(kinds.pop() if kinds else "iid", rows)  # without siblings the kind does not matter
        return Draft(
            tokens if isinstance(tokens, Awaited) and not old else (*self.tokens, *tokens),
            self.parents + tuple(parents),
            self.levels + (level,) * new,
            self.confidence + (tuple(confidence) if confidence is not None else (NAN,) * new),
            probs,
        )

    def relabelled(
        self, start: int, draft_probs: Sequence[Tensor | None] | None = None, confidence: Sequence[float] | None = None
    ) -> Draft:
        """This chain with a reviewer's distributions and confidence for the nodes from `start` on."""
        probs = self.probs
        if draft_probs is not None:
            before = probs.rows[:start] if probs is not None else (None,) * start
            probs = DraftProbs("iid", before + tuple(draft_probs))
        sure = self.confidence if confidence is None else self.confidence[:start] + tuple(confidence)
        return Draft(self.tokens, self.parents, self.levels, sure, probs)


def _branches(parents: Sequence[int]) -> bool:
    return len(set(parents)) < len(parents)
