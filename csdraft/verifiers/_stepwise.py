"""What rules share: the walk down the draft, node by node or along a chosen branch, and residual distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.match import Match

__all__ = ["TINY", "Stepwise", "accept_branch", "check_draft", "drawn_from", "left_over", "probs_without"]
__all__ += ["ratio", "residual", "unshared_probs"]

TINY = 1e-38
"""Stands for a draft probability that was rounded to zero."""


class Stepwise(Verifier):
    """A rule that walks down the draft and decides at each node which child to step into.

    At each node `aim` is the distribution that the next token must have. Each group of siblings supplies a part of it,
    and the next group gets what is left. The correction is drawn from what is left in the end. So the token at each
    node is exact. The distribution of every emitted token is reported, for a reviewer one level up.
    """

    draws: ClassVar = "independent"
    lenience: float = 1.0
    """Multiplies the chance to accept a drawn token."""

    def refusal(self, draft: Draft) -> str | None:
        return super().refusal(draft) or unshared_probs(self, draft)

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        check_draft(self, draft)
        if sampler.greedy:
            return self.greedy_rule.verify(draft, scores, sampler, root)
        accepted, all_probs, node = [], [], root
        while True:
            aim = self.aim(draft, node, scores.probs(node))  # (vocab,)
            all_probs.append(self.emitted_probs(draft, node, aim))
            kept, left = self.keeps(draft, node, aim, scores.row, sampler)
            if kept is None:
                token = sampler.draw(scores.row, left)
                return Verdict(accepted, token, scores.ends(node, token), all_probs)
            accepted.append(kept)
            if scores.ends(node, draft.tokens[kept]):
                return Verdict(accepted, None, True, all_probs)
            node = kept

    @property
    def greedy_rule(self) -> Verifier:
        """The rule for greedy decoding, where all distributions are one-hot."""
        return Match()

    def aim(self, draft: Draft, node: int, target_probs: Tensor) -> Tensor:
        """(vocab,) distribution that the token after `node` must have; the target's by default."""
        return target_probs

    def emitted_probs(self, draft: Draft, node: int, aim: Tensor) -> Tensor:
        """(vocab,) distribution that the token after `node` actually has; `aim` by default."""
        return aim

    def keeps(self, draft: Draft, node: int, aim: Tensor, row: int, sampler: Sampler) -> tuple[int | None, Tensor]:
        """The child of `node` to step into, or None; and the (vocab,) distribution of the correction."""
        left = aim
        for group in groups(draft, node):
            kept, left = (self.tries if len(group) > 1 else self.in_turn)(draft, group, left, row, sampler)
            if kept is not None:
                return kept, left
        return None, left

    def in_turn(
        self, draft: Draft, group: Sequence[int], left: Tensor, row: int, sampler: Sampler
    ) -> tuple[int | None, Tensor]:
        """What `keeps` returns, from siblings that were drawn independently and tried one after the other.

        Each is accepted with left / draft probability; if it is not, `left` (vocab,) becomes the residual without it.
        """
        for child in group:
            chance = ratio(left, draft, child)
            if sampler.accepts(row, chance if drawn_from(draft, child) is None else self.lenience * chance):
                return child, left
            left = residual(left, draft, child)
        return None, left

    tries = in_turn
    """The same for two or more siblings drawn from one distribution. Rules with other `kinds` have their own."""


def accept_branch(draft: Draft, scores: ScoresView, root: int, end: int, draw: Callable[[], int]) -> Verdict:
    """Accepts the nodes from `root` down to `end`, or to a token that ends the text; `draw` gives the next token."""
    accepted, node = [], root
    for kept in draft.path(end)[draft.depth(root) :]:
        accepted.append(kept)
        if scores.ends(node, draft.tokens[kept]):
            return Verdict(accepted, None, True)
        node = kept
    token = draw()
    return Verdict(accepted, token, scores.ends(node, token))


def check_draft(verifier: Verifier, draft: Draft) -> None:
    """Raises ValueError if `verifier` cannot verify `draft` exactly."""
    if reason := verifier.refusal(draft):
        raise ValueError(reason)


def groups(draft: Draft, node: int) -> list[list[int]]:
    """The children of `node`, grouped by the distribution that they were drawn from, in the order of the draws."""
    found: dict[tuple[bool, int], list[int]] = {}
    for child in draft.children(node):
        probs = drawn_from(draft, child)
        found.setdefault((False, child) if probs is None else (True, id(probs)), []).append(child)
    return list(found.values())


def drawn_from(draft: Draft, node: int) -> Tensor | None:
    """(vocab,) distribution that the node's token was drawn from; None for a point mass."""
    return None if draft.probs is None else draft.probs.rows[node]


def ratio(target_probs: Tensor, draft: Draft, node: int) -> float:
    """Target / draft probability of the node's token."""
    token, draft_probs = draft.tokens[node], drawn_from(draft, node)
    if draft_probs is None:
        return float(target_probs[token])
    return float(target_probs[token]) / max(float(draft_probs[token]), TINY)


def residual(target_probs: Tensor, draft: Draft, node: int) -> Tensor:
    """(vocab,) distribution after the node is rejected: max(target - draft, 0), normalised."""
    draft_probs = drawn_from(draft, node)
    if draft_probs is not None:
        return left_over((target_probs - draft_probs.to(target_probs)).clamp_(min=0), target_probs)
    rest = target_probs.clone()
    rest[draft.tokens[node]] = 0
    return left_over(rest, target_probs)


def left_over(rest: Tensor, target_probs: Tensor) -> Tensor:
    """(vocab,) `rest` normalised. If it is all 0, both distributions agree up to rounding: then the target's."""
    total = rest.sum()
    return rest / total if total > 0 else target_probs


def probs_without(draft_probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """(vocab,) distribution of the next draw without replacement, after `tokens` were drawn.

    If no probability is left, it is uniform over all tokens that were not drawn (Sequoia, arXiv 2402.12374).
    """
    if not tokens:
        return draft_probs
    rest = draft_probs.clone()  # (vocab,)
    rest[list(tokens)] = 0
    if not rest.sum() > 0:
        rest.fill_(1)
        rest[list(tokens)] = 0
    return rest / rest.sum()


def unshared_probs(verifier: Verifier, draft: Draft) -> str | None:
    """Why the draft cannot be verified: siblings that are not "iid" must share one distribution, in one tensor."""
    if draft.probs is None or draft.is_chain or draft.probs.kind == "iid":
        return None
    all_probs: dict[int, Tensor] = {}
    for parent, probs in zip(draft.parents, draft.probs.rows, strict=True):
        if probs is not None and all_probs.setdefault(parent, probs) is not probs:
            return (
                f"siblings below node {parent} were drawn as {draft.probs.kind!r} from more than one distribution; "
                f"{type(verifier).__name__} needs them to share one tensor: draw them as 'iid', or from one drafter"
            )
    return None
