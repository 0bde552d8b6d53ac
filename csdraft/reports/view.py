"""A report in one sentence, in more sentences and tables, and as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csdraft.amounts import size_text
from csdraft.reports.tally import Tally

if TYPE_CHECKING:
    from csdraft.reports.report import Report

__all__ = ["Bar", "Table", "count", "headlines", "percent", "ratio", "sentence", "tables", "terminal"]

WIDTH, BAR_WIDTH = 100, 24
"""Columns of a terminal, and of a full bar."""
DEPTHS_SHOWN = 16
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Bar:
    """A cell that draws a share between 0 and 1."""

    share: float

    def __str__(self) -> str:
        eighths = round(min(max(self.share, 0.0), 1.0) * BAR_WIDTH * 8)
        return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


@dataclass(frozen=True)
class Table:
    """A table with a title. The first column and bars are aligned left, numbers right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str | Bar, ...]]


# The content, for the terminal and for pages.


def headlines(report: Report) -> list[str]:
    """The report in a few sentences."""
    if not report.rounds:
        return [f"csdraft report: nothing generated in {count(report.calls, 'call')}"]
    lines = [
        f"csdraft report: {count(report.emitted, 'token')} in {count(report.calls, 'call')}, {report.seconds:.2f} s, "
        f"{report.tokens_per_second:,.1f} tokens/s",
        f"block efficiency {report.block_efficiency:.2f} (mean acceptance length): {count(report.emitted, 'token')} / "
        f"{count(report.rounds, 'round')}, prefill rounds included",
        f"acceptance rate {percent(report.acceptance_rate)} of the tokens tried; "
        f"{count(report.target_calls, 'target forward')}; {count(report.plain_rounds, 'round')} without a draft",
    ]
    if report.why:
        lines.append(report.why)
    for name, use in report.models.items():
        if use.recorded:
            lines.append(f"{count(use.recorded, 'recorded shape')} of {name} took {size_text(use.recorded_bytes)}")
    if report.cut:
        lines.append(f"{count(report.cut, 'draft token')} of the K matrix cut by the schedule or the text's end")
    if (plan := report.planned) is not None:
        measured = f"{report.block_efficiency:.2f}"
        if len(report.tokens) == 1:  # the plan is for one row
            measured += f" and {plan.plain_seconds * ratio(report.emitted, report.seconds):.2f} x"
        lines += [
            f"planned: k_matrix {plan.k_matrix} of {', '.join(plan.drafters)}",
            f"expected {plan.tokens_per_round:.2f} tokens a round and {plan.speedup:.2f} x plain, measured {measured}",
        ]
    if (found := report.rejections) is not None:
        lines.append(
            f"{found.measured:,} rejections at {found.judged:,} judged positions, {found.expected:.1f} expected: "
            f"{found.limit}"
        )
    lines += [f"a drafter failed and was left out ({times}x): {message}" for message, times in report.failures.items()]
    return lines


def tables(report: Report) -> list[Table]:
    """All tables that are not empty."""
    inner = [review(name, tally) for name, tally in report.reviews.items() if name != "target"]
    found = [review("target", report.target), depths(report.target), *inner, models(report)]
    return [table for table in found if table.rows]


def review(reviewer: str, tally: Tally) -> Table:
    """What one reviewer accepted, by the level that drafted it."""
    share = "of the text" if reviewer == "target" else "of its draft"
    head = ("level", "drafted", "tried", "accepted", "acceptance", share)
    rows: list[tuple[str | Bar, ...]] = []
    for name, drafted in tally.drafted.items():
        tried, accepted = tally.tried[name], tally.accepted[name]
        numbers = (f"{drafted:,}", f"{tried:,}", f"{accepted:,}", percent(ratio(accepted, tried)))
        rows.append((name, *numbers, percent(ratio(accepted, tally.emitted))))
    own = (f"{reviewer} itself", "", "", f"{tally.own:,}", "", percent(ratio(tally.own, tally.emitted)))
    length = f"{ratio(tally.emitted, tally.rounds):.2f} tokens a round"
    return Table(f"reviewed by {reviewer} ({count(tally.rounds, 'round')}, {length})", head, [*rows, own])


def depths(tally: Tally) -> Table:
    """Acceptance by depth; all depths after the first `DEPTHS_SHOWN` share one row."""
    rows: list[tuple[str | Bar, ...]] = []
    table = tally.by_depth
    groups = [(str(depth + 1), [pair]) for depth, pair in enumerate(table[:DEPTHS_SHOWN])]
    if len(table) > DEPTHS_SHOWN:
        groups.append((f"{DEPTHS_SHOWN + 1}-{len(table)}", table[DEPTHS_SHOWN:]))
    for name, pairs in groups:
        tried, accepted = (sum(values) for values in zip(*pairs, strict=True))
        share = ratio(accepted, tried)
        rows.append((name, f"{tried:,}", f"{accepted:,}", percent(share), Bar(share)))
    head = ("depth", "tried", "accepted", "rate", "")
    return Table("by depth in the draft (tried: all before it were kept)", head, rows)


def models(report: Report) -> Table:
    """What each model did, and how long the rest of the loop took."""
    rows: list[tuple[str | Bar, ...]] = []
    for name, use in report.models.items():
        label = name if use.name in (name, "") else f"{name} ({use.name})"
        numbers = (f"{use.forwards:,}", f"{use.fed:,}", f"{use.rolled_back:,}", f"{use.seconds:.2f}")
        each = f"{1000 * ratio(use.seconds, use.forwards):.2f}"
        rows.append((label, *numbers, percent(ratio(use.seconds, report.seconds)), each, size_text(use.cache_bytes)))
    if rows:
        share = percent(ratio(report.loop_seconds, report.seconds))
        rows.append(("everything else", "", "", "", f"{report.loop_seconds:.2f}", share, "", ""))
    head = ("model", "forwards", "fed", "rolled back", "seconds", "of all", "ms each", "cache")
    return Table("models (tokens fed and rolled back; host clock)", head, rows)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# The terminal.


def terminal(report: Report) -> str:
    """Headlines and tables of at most 100 columns."""
    lines = [part for line in headlines(report) for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    for table in tables(report) if report.rounds else ():
        lines += ["", clipped(table.title, WIDTH), *_aligned(table)]
    return "\n".join(lines)


def _aligned(table: Table) -> Iterable[str]:
    cells = [table.head, *(tuple(map(str, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(2 + width for width in widths[1:]) - 2)
    bars = {column for column, cell in enumerate(table.rows[0]) if isinstance(cell, Bar)}
    for row in cells:
        padded = [
            clipped(cell, width).ljust(width) if column == 0 or column in bars else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(padded)).rstrip()


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


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
