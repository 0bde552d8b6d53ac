"""Vertical cascade: a model drafts by reviewing what a cheaper drafter proposes, instead of writing token by token.

Cascade Speculative Drafting (arXiv 2312.11462, section 3.1): drafting is itself generation, so speculative decoding
speeds it up too, down to a statistical drafter that costs nothing. It pays if the inner draft multiplies the tokens of
a reviewer's forward by more than 1 + (cost of the inner draft / cost of the forward).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.feature_session import taps_of
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, ScoresView, Verdict, Verifier
from csdraft.decoding.rounds import review
from csdraft.decoding.sampling import Sampler
from csdraft.drafters._check_parts import check_parts
from csdraft.models import check_reviewer, given_model
from csdraft.verifiers.lenient import Lenient, check_lenience
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.spec_hub import SpecHub
from csdraft.verifiers.without_replacement import WithoutReplacement

__all__ = ["Vertical"]


@dataclass(frozen=True, eq=False)
class Vertical(Drafter):
    """Runs rounds of `drafter` under `reviewer` until the draft is long enough, or has a token to stop at.

    Args:
        reviewer: the model that checks drafts and writes this drafter's tokens; a path or Hub id is loaded.
        drafter: writes the drafts that the reviewer checks.
        lenience: >= 1; how far below its own choice the reviewer lets a drafted token pass (1: not at all). The
            target still checks everything, so this trades acceptance for cheaper drafting, never exactness.
        inner_length: tokens that the inner drafter drafts per round; None: its own `depth`.
        depth: tokens wanted by default.
    """

    reviewer: nn.Module | str | os.PathLike
    drafter: Drafter
    lenience: float = 1.0
    inner_length: int | None = None
    depth: int = 8  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_parts(self)
        check_lenience(self.lenience)
        object.__setattr__(self, "reviewer", given_model(self.reviewer, "reviewer"))

    def parts(self) -> Sequence[Drafter]:
        return (self.drafter,)

    def models(self) -> list[object]:
        return [self.reviewer, *super().models()]

    def taps(self) -> frozenset[int]:
        return super().taps() | taps_of(self.reviewer)

    def check(self, call: Call) -> None:
        check_reviewer(self.reviewer, call)  # type: ignore[arg-type]
        super().check(call)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call = contexts[0].call
        session, level = call.session(self.reviewer), call.level(self.reviewer)  # type: ignore[arg-type]
        verifier = self._verifier(call, level)
        confidence = any(budget.confidence or budget.stop for budget in budgets)
        sure = verifier.draws == "coupled" and verifier.reads_confidence  # whether the inner drafter's is read
        before = [context.draft.main_branch for context in contexts]  # all that the reviewer reads of it
        drafts = list(before)
        limits = [min(b.room, session.left(c)) for b, c in zip(budgets, contexts, strict=True)]
        live = [i for i, b in enumerate(budgets) if b.depth > 0 and limits[i] > 0]
        length = self.drafter.depth if self.inner_length is None else self.inner_length
        while live:
            inner = [contexts[i].after(drafts[i]) for i in live]
            # One less than the room, since the reviewer adds a token itself.
            rooms = [limits[i] - (len(drafts[i]) - len(before[i])) - 1 for i in live]
            asked = [Budget(min(length, room), room, confidence=sure) for room in rooms]
            proposed = self.drafter.propose(inner, asked)
            _check_probs(inner, proposed, verifier)
            rounds = review(inner, proposed, session, level, verifier, confidence)
            unfinished = []
            for i, finished in zip(live, rounds, strict=True):
                drafts[i] = finished.extended
                grown = len(drafts[i]) - len(before[i])
                ended = finished.verdict.ended or _stops(budgets[i], finished)
                if grown < min(budgets[i].depth, limits[i]) and not ended:
                    unfinished.append(i)
            live = unfinished
        return [context.draft.continued(draft) for context, draft in zip(contexts, drafts, strict=True)]

    def _verifier(self, call: Call, level: int) -> Verifier:
        """The inner levels draw as the outermost verifier does."""
        if call.sampler.coupled or call.sampler.greedy:
            return Lenient(self.lenience, level)
        return Rejection(self.lenience) if self.lenience > 1 else ByDraws()


@dataclass(frozen=True)
class ByDraws(Verifier):
    """Verifies each draft by the rule that is exact for the way its siblings were drawn."""

    lossless = True  # type: ignore[assignment]
    draws: ClassVar = "independent"
    kinds: ClassVar = frozenset({"iid", "without_replacement", "pair"})

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        return self._rule(draft).verify(draft, scores, sampler, root)

    def refusal(self, draft: Draft) -> str | None:
        return self._rule(draft).refusal(draft)

    @staticmethod
    def _rule(draft: Draft) -> Verifier:
        kind = "iid" if draft.probs is None else draft.probs.kind
        return {"iid": Rejection, "without_replacement": WithoutReplacement, "pair": SpecHub}[kind]()


def _check_probs(contexts: Sequence[Context], drafts: Sequence[Draft], verifier: Verifier) -> None:
    """Raises ValueError if a token's `draft_probs` are not a distribution: passed on, they would bias the text."""
    for context, draft in zip(contexts, drafts, strict=True) if verifier.draws == "independent" else ():
        if draft.probs is not None and (flaw := draft.probs.flaw(context.call.vocab, len(context.draft))):
            raise ValueError(flaw)


def _stops(budget: Budget, finished: Round) -> bool:
    """Whether the budget says to stop after one of the emitted tokens; they are all kept."""
    if budget.stop is None or finished.confidence is None:
        return False
    above = [finished.context.tip, *finished.verdict.accepted]
    return any(
        budget.stop(confidence, partial(finished.scores.entropy, node))
        for confidence, node in zip(finished.confidence, above, strict=False)  # a text may end on an accepted node
    )
