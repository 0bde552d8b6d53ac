"""The round: draft, score, verify. The target and every inner reviewer of a cascade share `review`."""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Request, Round, ScoresView, Verdict, Verifier
from csdraft.decoding.session import Session

__all__ = ["review", "run_round"]

TARGET = 0
"""The target's level number."""


def run_round(
    contexts: Sequence[Context],
    target: Session,
    drafter: Drafter,
    verifier: Verifier,
    budgets: Sequence[Budget],
) -> list[Round]:
    """One round of every row: `drafter` proposes, the target scores, `verifier` decides."""
    ledger = contexts[0].call.ledger
    began = ledger.mark()
    drafts = drafter.propose(contexts, budgets)
    ledger.drafted(began, ledger.mark())
    return review(contexts, drafts, target, TARGET, verifier)


def review(
    contexts: Sequence[Context],
    drafts: Sequence[Draft],
    reviewer: Session,
    level: int,
    verifier: Verifier,
    confidence: bool = False,
) -> list[Round]:
    """Scores one draft per row in one forward; each row keeps what the verifier keeps, and adds the reviewer's token.

    The results are also recorded in the call's ledger.

    Args:
        level: the reviewer's level number.
        confidence: whether the emitted tokens' confidence will be read by a reviewer above.
    """
    call = contexts[0].call
    together = call.together if level == TARGET else None
    padding = () if together is None else call.rows_of_padding  # before anything is decided
    if together is not None:
        drafts = together.drafts(contexts, drafts)
    for context, draft in zip(contexts, drafts, strict=True):
        _check_continued(context.draft, draft)
    requests = [Request(c.row, c.text, d, range(c.tip, len(d))) for c, d in zip(contexts, drafts, strict=True)]
    views = reviewer.score(requests, chooser=call.chooser if level == TARGET else call.drafting)
    if together is not None:
        verdicts = together.verify(drafts, views)
    else:
        verdicts = [
            verifier.verify(draft, scores, call.sampler, context.tip)
            for context, draft, scores in zip(contexts, drafts, views, strict=True)
        ]
    rounds = []
    for context, draft, scores, verdict in zip(contexts, drafts, views, verdicts, strict=True):
        sure = _confidence(context, draft, scores, verdict) if confidence else None
        rounds.append(Round(context, draft, verdict, level, scores, sure))
    call.ledger.reviewed(level, [r for r in rounds if r.context.row not in padding] if padding else rounds)
    return rounds


def _confidence(context: Context, draft: Draft, scores: ScoresView, verdict: Verdict) -> list[float]:
    """Each emitted token's probability under the model whose choice it was: the reviewer's, unless it was lenient."""
    sure, node = [], context.tip
    drawn = verdict.emitted_probs is not None  # independent draws have no choice to compare with
    for kept in verdict.accepted:
        token = draft.tokens[kept]
        own = drawn or scores.choice(node) == token
        sure.append(scores.soft(node, token) if own else draft.confidence[kept])
        node = kept
    if verdict.next_token is not None:
        sure.append(scores.soft(node, verdict.next_token))
    return sure


def _check_continued(before: Draft, draft: Draft) -> None:
    """A drafter must return the nodes it was given, with their distributions: losing one would bias sampling."""
    size, kept = len(before), draft.continues(before)
    if kept and before.probs is not None:
        rows = draft.probs.rows[:size] if draft.probs is not None else ()
        kept = len(rows) == size and all(a is b for a, b in zip(rows, before.probs.rows, strict=True))
    if not kept:
        raise ValueError(
            f"a drafter was given {size} drafted tokens to continue from, but its draft does not begin with them, "
            "unchanged; build on context.draft.extend(...)"
        )
