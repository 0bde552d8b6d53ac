"""A report in one sentence: how much faster it was, what drafted, and what would help most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csdraft.reports.view import percent, ratio

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["sentence"]

SAME = 0.05
"""A speedup that differs from 1 by less than this counts as 1."""
NAMED = 2
"""The sentence names this many drafters, those with the largest share of the text."""
WORTH_SAVING = 0.35
"""Work that takes more than this share of the time is worth saving."""


def sentence(report: Report) -> str:
    """The sentence, in three parts."""
    if not report.rounds:
        return "Nothing was generated."
    return f"{gain(report)}; {drafters(report)}; {advice(report)}."


def gain(report: Report) -> str:
    """How much faster it was, if that is known; else how many tokens a call of the target gave."""
    speedup = report.speedup
    if speedup is None:
        return f"Each call of the target gave {report.block_efficiency:.2f} tokens, where plain decoding has 1"
    if abs(speedup - 1) < SAME:
        return "About as fast as plain decoding"
    if speedup < 1:
        return f"Slower than plain decoding, at about {speedup:.2f} times its speed"
    return f"About {speedup:.2f} times as fast as plain decoding"


def drafters(report: Report) -> str:
    """Which drafters wrote how much of the text."""
    most = [(name, tokens) for name, tokens in report.target.accepted.most_common(NAMED) if tokens]
    shares = [(percent(ratio(tokens, report.emitted)), name) for name, tokens in most]
    if not shares:
        return "no drafted token was kept" if report.target.drafted.total() else "nothing was drafted"
    (first, drafter), *others = shares
    return " and ".join(
        [f"{first} of the text was drafted by {drafter}", *(f"{share} by {name}" for share, name in others)]
    )


def advice(report: Report) -> str:
    """What would help most: failures and times come first, then how most rounds ended."""
    if report.failures:
        return "a drafter failed and was left out, so repairing it would help most"
    if not report.target.drafted.total():
        return "another drafter would have to pay for itself here" if report.why else "a drafter would help most"
    drafting, outside = ratio(report.drafting, report.seconds), ratio(report.loop_seconds, report.seconds)
    if drafting > WORTH_SAVING:
        return f"a cheaper drafter would help most, since drafting took {percent(drafting)} of the time"
    if outside > WORTH_SAVING:
        return f"less work outside the models would help most, since it took {percent(outside)} of the time"
    ends = endings(report)
    end, rounds = max(ends.items(), key=lambda item: item[1])
    share = percent(ratio(rounds, report.rounds))
    if end == "no draft":
        return f"a drafter that proposes more often would help most, since {share} of the rounds had no draft"
    if end == "kept whole":
        return f"longer drafts would help most, since {share} of the rounds kept their draft whole"
    target = report.target
    worst = max(target.tried, key=lambda name: target.tried[name] - target.accepted[name])
    return (
        f"a drafter closer to the target would help most, since {share} of the rounds ended with a rejected token, "
        f"most often one of {worst}"
    )


def endings(report: Report) -> dict[str, int]:
    """How many rounds ended with a rejected token, had no draft, or kept their draft whole."""
    outcomes = report.target.outcomes
    rejected = sum(rounds for (accepted, tried), rounds in outcomes.items() if accepted < tried)
    return {"rejected": rejected, "no draft": report.plain_rounds, "kept whole": outcomes.total() - rejected}
