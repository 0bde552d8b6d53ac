"""Counts of what a reviewer decided about its drafts, by the level that drafted and by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, zip_longest
from typing import Any, get_origin

from csdraft.decoding.interfaces import Round
from csdraft.stored import UNFIT, fit

__all__ = ["Tally", "counted"]


@dataclass
class Tally:
    """Counts of one reviewer's rounds; a round is one row's draft, reviewed in one forward.

    A drafted token is *tried* if all tokens before it were kept, so that the reviewer had to decide about it. Of
    siblings in a tree one is tried: the kept one, or the first if none was kept. Levels are numbers during a call, and
    names afterwards.

    Attributes:
        rounds: all rounds.
        plain: rounds without a draft.
        emitted: tokens that the rounds added, with the reviewer's own corrections and bonus tokens.
        drafted, tried, accepted: tokens by the level that chose them.
        outcomes: number of rounds by (tokens accepted, tokens tried).
        ranks: for nodes of trees, how often each child was kept, by (number of children, rank of the kept one, or -1
            if none was).
    """

    rounds: int = 0
    plain: int = 0
    emitted: int = 0
    drafted: Counter = field(default_factory=Counter)
    tried: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    ranks: Counter[tuple[int, int]] = field(default_factory=Counter)

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
            for level in set(new):  # with few levels, `count` takes a fifth of the time of Counter.update
                self.drafted[level] += new.count(level)
                self.tried[level] += tried.count(level)
                self.accepted[level] += accepted.count(level)
            self.outcomes[len(accepted), len(tried)] += 1
            if not draft.is_chain:
                self.ranks.update(_ranks(finished))

    def named(self, names: Sequence[str]) -> Tally:
        """A copy with the levels' names in place of their numbers."""
        counts = {
            key: Counter({names[level]: n for level, n in sorted(getattr(self, key).items())}) for key in BY_LEVEL
        }
        return replace(self, **counts, outcomes=self.outcomes.copy(), ranks=self.ranks.copy())

    def merged(self, other: Tally) -> Tally:
        """The counts of both."""
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def own(self) -> int:
        """Tokens that the reviewer itself chose: corrections and bonus tokens."""
        return self.emitted - self.accepted.total()

    @property
    def by_depth(self) -> list[tuple[int, int]]:
        """How many tokens were tried and accepted at each depth, as (tried, accepted), the first draft token first."""
        reached: list[Counter[int]] = [Counter(), Counter()]  # rounds by the deepest token that was tried, or accepted
        for (accepted, tried), rounds in self.outcomes.items():
            reached[0][tried] += rounds
            reached[1][accepted] += rounds
        depths = range(max(reached[0], default=0), 0, -1)  # a round that got deeper counts at each depth on the way
        columns = [accumulate([counts[depth] for depth in depths]) for counts in reached]
        return list(zip(*columns, strict=True))[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only; `counted` reads its counters."""
        pairs = {key: [[*pair, n] for pair, n in sorted(getattr(self, key).items())] for key in BY_PAIR}
        return {field.name: getattr(self, field.name) for field in fields(self)} | pairs


BY_LEVEL, BY_PAIR = ("drafted", "tried", "accepted"), ("outcomes", "ranks")


def counted(value: Any, arms: Sequence[Any], at: str) -> Any:
    """Reads counters for `csdraft.stored.fit`: those by name from an object, those by pair from [one, other, n]."""
    if any(get_origin(arm) is Counter for arm in arms):
        return Counter({(one, other): n for one, other, n in fit(value, list[tuple[int, int, int]], at)})
    return Counter(fit(value, dict[str, int], at)) if Counter in arms else UNFIT


def _ranks(finished: Round) -> list[tuple[int, int]]:
    """(number of children, rank of the kept one or -1) for each node of a tree at which the reviewer had to choose."""
    draft, verdict = finished.draft, finished.verdict
    nodes = [finished.context.tip, *verdict.accepted]
    found = []
    for node, kept in zip_longest(nodes, verdict.accepted):
        children = draft.children(node)
        wanted = kept is not None or verdict.next_token is not None
        if wanted and children:
            found.append((len(children), -1 if kept is None else children.index(kept)))
    return found
