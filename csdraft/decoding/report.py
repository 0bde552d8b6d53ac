"""How a call went: rounds, block efficiency, acceptance by level and depth, tokens and seconds by model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Drafter, Round

__all__ = ["Report"]


@dataclass
class Report:
    """Counts of one call, or of several merged."""

    calls: int = 1
    rounds: int = 0
    target_calls: int = 0
    emitted: int = 0
    drafted: Counter = field(default_factory=Counter)  # by level name
    accepted: Counter = field(default_factory=Counter)
    tried_at: Counter = field(default_factory=Counter)  # by depth, 1 = first draft token
    accepted_at: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    levels: list[list[int]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, call: Call, drafter: Drafter | None) -> Report:
        return cls(tokens=[[] for _ in range(call.rows)], levels=[[] for _ in range(call.rows)])

    def add(self, rounds: Sequence[Round]) -> None:
        self.target_calls += 1
        for r in rounds:
            self.rounds += 1
            self.emitted += len(r.tokens)
            self.drafted.update(r.draft.levels)
            self.accepted.update(r.draft.levels[n] for n in r.verdict.accepted)
            self.tokens[r.context.row] += r.tokens
            self.levels[r.context.row] += r.levels

    def finish(self, call: Call, seconds: float, failure: str | None) -> None:
        self.seconds = seconds
        if failure:
            self.failures.append(failure)
        for s in call.sessions:
            self.models.append(
                {"forwards": s.runner.forwards, "fed": s.runner.fed, "rolled_back": s.rolled_back, "seconds": s.runner.seconds}
            )

    @property
    def block_efficiency(self) -> float:
        return self.emitted / max(self.rounds, 1)
