"""A report in one sentence, for a manager: how much faster, what drafted, and what would help most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csdraft.reports.view import percent, ratio

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["sentence"]

SAME = 0.05
"""A speedup that differs less from 1 is none."""
NAMED = 2
"""Drafters that the sentence names, those with the largest share of the text."""
OFTEN = 0.35
"""Share of the time from which on it is worth saving."""


def sentence(report: Report) -> str:
    """Its three parts; every figure is the report's own."""
    if not report.rounds:
        return "Nothing was generated."
    return f"{gain(report)}; {drafters(report)}; {advice(report)}."


def gain(report: Report) -> str:
    """How much faster, where that is known; otherwise what a call of the target gave."""
    speedup = report.speedup
    if speedup is None:
        return f"Each call of the target gave {report.block_efficiency:.2f} tokens, where plain decoding has 1"
    if abs(speedup - 1) < SAME:
        return "About as fast as plain decoding"
    if speedup < 1:
        return f"Slower than plain decoding, at about {speedup:.2f} times its speed"
    return f"About {speedup:.2f} times as fast as plain decoding"


def drafters(report: Report) -> str:
    """Who wrote how much of the text."""
    shares = [(name, ratio(tokens, report.emitted)) for name, tokens in report.target.accepted.most_common(NAMED)]
    said = [f"{percent(share)} of the text was drafted by {name}" for name, share in shares if share]
    if said:
        return " and ".join([said[0], *(part.replace(" of the text was drafted", "") for part in said[1:])])
    return "nothing that was drafted was kept" if report.target.drafted.total() else "nothing was drafted"


def advice(report: Report) -> str:
    """What would help most, by the counts: time first, then how most rounds ended."""
    if report.failures:
        return "a drafter failed and was left out, so repairing it would help most"
    if not report.target.drafted.total():
        return "another drafter would have to pay for itself here" if report.why else "a drafter would help most"
    drafting, outside = ratio(report.drafting, report.seconds), ratio(report.loop_seconds, report.seconds)
    if drafting > OFTEN:
        return f"a cheaper drafter would help most, since drafting took {percent(drafting)} of the time"
    if outside > OFTEN:
        return f"less work outside the models would help most, since it took {percent(outside)} of the time"
    ends = endings(report)
    end, rounds = max(ends.items(), key=lambda item: item[1])
    share = percent(ratio(rounds, report.rounds))
    if end == "no draft":
        return f"a drafter with more to propose would help most, since {share} of the rounds had no draft"
    if end == "kept whole":
        return f"longer drafts would help most, since {share} of the rounds kept their draft whole"
    return (
        f"a drafter closer to the target would help most, since {share} of the rounds ended with a rejected token, "
        f"most often one of {most_rejected(report)}"
    )


def endings(report: Report) -> dict[str, int]:
    """How rounds ended, and how many did: nothing was drafted, a token was rejected, or the draft was kept whole."""
    outcomes = report.target.outcomes
    rejected = sum(rounds for (accepted, tried), rounds in outcomes.items() if accepted < tried)
    return {"rejected": rejected, "no draft": report.plain_rounds, "kept whole": outcomes.total() - rejected}


def most_rejected(report: Report) -> str:
    """The drafter with the most tokens that the target looked at and rejected."""
    target = report.target
    return max(target.tried, key=lambda name: target.tried[name] - target.accepted[name])
