"""A ledger that also counts what the reviewers of a call decide, and makes a report of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Round
from csdraft.decoding.ledger import Ledger
from csdraft.decoding.names import name_of
from csdraft.decoding.sampling import Sampler
from csdraft.reports.rejections import Rejections
from csdraft.reports.report import Report
from csdraft.reports.tally import Tally

__all__ = ["Recorder"]


class Recorder(Ledger):
    """Counts the rounds of one call; `report` sums them up.

    Args:
        diagnose: whether to compare the target's and the draft's distribution at every token that is verified.
    """

    def __init__(self, rows: int, diagnose: bool = False):
        super().__init__()
        self.tallies: defaultdict[int, Tally] = defaultdict(Tally)  # by the reviewer's level
        tokens, levels, lengths, rejected = ([[] for _ in range(rows)] for _ in range(4))
        self.counted = Report(tokens=tokens, levels=levels, lengths=lengths, rejected=rejected)
        self.counted.rejections = Rejections() if diagnose else None

    def check(self, sampler: Sampler) -> None:
        """Raises ValueError if the call's draws cannot be diagnosed."""
        if self.counted.rejections is not None and (sampler.greedy or sampler.coupled):
            raise ValueError(
                "diagnose=True compares distributions, and greedy and coupled draws have none; pass do_sample=True "
                "and a verifier of independent draws, such as 'rejection'"
            )

    def count(self, level: int, rounds: Sequence[Round]) -> None:
        """Counts finished rounds of the reviewer at `level`; a few microseconds per row."""
        self.tallies[level].add(rounds)
        if level:
            return
        counted = self.counted
        counted.target_calls += 1
        if counted.rejections is not None:
            counted.rejections.add(rounds)
        for finished in rounds:
            row, tokens = finished.context.row, finished.tokens
            counted.tokens[row] += tokens
            counted.levels[row] += finished.levels
            counted.lengths[row].append(len(tokens))
            kept_whole = len(finished.draft.levels) == len(finished.verdict.accepted)
            counted.rejected[row].append([] if kept_whole else _rejected(finished))

    def report(self, call: Call) -> Report:
        """The report of a finished call."""
        names, plain_seconds = call.level_names, self._plain_seconds()
        return replace(
            self.counted,
            cut=self.cut,
            seconds=self.seconds,
            drafting=self.drafting,
            reviews={names[level]: self.tallies[level].named(names) for level in sorted(self.tallies)},
            models={_model_name(call, session.model): session.use for session in call.sessions},
            failures=Counter([self.failure] if self.failure else ()),
            why=self.why,
            level_names=names,
            plain_seconds=plain_seconds,
            compared_seconds=self.seconds if plain_seconds else 0.0,
        )

    def _plain_seconds(self) -> float:
        """Estimated seconds of plain decoding: the first round, and a plain step for each further token.

        0 if there is more than one row, or no plain step was measured.
        """
        if len(self.counted.tokens) > 1 or not self.plain_step or self.first is None:
            return 0.0
        return self.first + self.plain_step * (len(self.counted.tokens[0]) - 1)


def _rejected(finished: Round) -> list[tuple[int, int]]:
    """How many tokens of each level were drafted and not kept, as (level, tokens)."""
    drafted, kept = finished.draft.levels, finished.levels[: finished.accepted]
    counts = [(level, drafted.count(level) - kept.count(level)) for level in dict.fromkeys(drafted)]
    return [(level, tokens) for level, tokens in counts if tokens]


def _model_name(call: Call, model: Any) -> str:
    """A model's name in the report: that of its level."""
    owners = call.level_owners
    if model is call.target or model not in owners:
        return "target" if model is call.target else name_of(model)
    return call.level_names[owners.index(model)]
