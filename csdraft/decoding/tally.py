"""What a reviewer made of the drafts it was shown: counts by the level that drafted and by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from csdraft.decoding.interfaces import Round

__all__ = ["Tally"]


@dataclass
class Tally:
    """Counts of one reviewer's rounds; a round is one row's draft, judged in one forward.

    A drafted token is *tried* if all before it were kept, so that the reviewer had to decide about it. Of siblings in
    a tree one is tried: the one that was kept, or else the first. Levels are numbers during a call, names afterwards.

    Attributes:
        rounds: rounds, and `plain` those of them for which nothing was drafted.
        emitted: tokens the rounds added, the reviewer's own corrections and bonus tokens included.
        drafted, tried, accepted: tokens by the level whose choice they were.
        outcomes: how many rounds accepted and tried so many tokens, by (accepted, tried).
    """

    rounds: int = 0
    plain: int = 0
    emitted: int = 0
    drafted: Counter = field(default_factory=Counter)
    tried: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, rounds: Sequence[Round]) -> None:
        """Counts finished rounds; a few microseconds each."""
        for finished in rounds:
            draft, verdict, context = finished.draft, finished.verdict, finished.context
            kept = verdict.accepted
            self.rounds += 1
            self.emitted += len(finished.levels)
            new = draft.levels[len(context.draft) :]
            if not new:
                self.plain += 1
                continue
            accepted = tried = finished.levels[: len(kept)]
            if verdict.next_token is not None and (refused := draft.children(kept[-1] if kept else context.tip)):
                tried = [*accepted, draft.levels[refused[0]]]
            for level in set(new):  # `count` and few levels: a fifth of the time of Counter.update
                self.drafted[level] += new.count(level)
                self.tried[level] += tried.count(level)
                self.accepted[level] += accepted.count(level)
            self.outcomes[len(accepted), len(tried)] += 1

    def named(self, names: Sequence[str]) -> Tally:
        """The same counts, by the levels' names."""
        drafted, tried, accepted = (
            Counter({names[level]: n for level, n in sorted(counter.items())})
            for counter in (self.drafted, self.tried, self.accepted)
        )
        return Tally(self.rounds, self.plain, self.emitted, drafted, tried, accepted, Counter(self.outcomes))

    def merged(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.rounds + other.rounds,
            self.plain + other.plain,
            self.emitted + other.emitted,
            self.drafted + other.drafted,
            self.tried + other.tried,
            self.accepted + other.accepted,
            self.outcomes + other.outcomes,
        )

    @property
    def own(self) -> int:
        """Tokens that the reviewer wrote itself: corrections and bonus tokens."""
        return self.emitted - self.accepted.total()

    @property
    def by_depth(self) -> list[tuple[int, int]]:
        """(tried, accepted) at each depth, the first draft token first."""
        deepest = max((tried for _, tried in self.outcomes), default=0)
        table = [[0, 0] for _ in range(deepest)]
        for (accepted, tried), rounds in self.outcomes.items():
            for depth in range(tried):
                table[depth][0] += rounds
                table[depth][1] += rounds * (depth < accepted)
        return [(tried, accepted) for tried, accepted in table]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        counts = {name: dict(getattr(self, name)) for name in ("drafted", "tried", "accepted")}
        outcomes = [[accepted, tried, rounds] for (accepted, tried), rounds in sorted(self.outcomes.items())]
        return {"rounds": self.rounds, "plain": self.plain, "emitted": self.emitted, **counts, "outcomes": outcomes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        """The inverse of `to_dict`."""
        drafted, tried, accepted = (Counter(data[name]) for name in ("drafted", "tried", "accepted"))
        outcomes = Counter({(accepted, tried): rounds for accepted, tried, rounds in data["outcomes"]})
        return cls(data["rounds"], data["plain"], data["emitted"], drafted, tried, accepted, outcomes)
