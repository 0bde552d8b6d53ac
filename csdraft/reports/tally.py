"""What a reviewer made of the drafts it was shown: counts by the level that drafted and by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

from csdraft.decoding.interfaces import Round
from csdraft.stored import check_keys, fit

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
        ranks: of trees, how often which child of a node was kept, by (children, its rank among them or -1 for none).
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
            for level in set(new):  # `count` and few levels: a fifth of the time of Counter.update
                self.drafted[level] += new.count(level)
                self.tried[level] += tried.count(level)
                self.accepted[level] += accepted.count(level)
            self.outcomes[len(accepted), len(tried)] += 1
            if not draft.is_chain:
                self.ranks.update(_ranks(finished))

    def named(self, names: Sequence[str]) -> Tally:
        """The same counts, by the levels' names."""
        drafted, tried, accepted = (
            Counter({names[level]: n for level, n in sorted(counter.items())})
            for counter in (self.drafted, self.tried, self.accepted)
        )
        return Tally(
            self.rounds, self.plain, self.emitted, drafted, tried, accepted, self.outcomes.copy(), self.ranks.copy()
        )

    def merged(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

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
            for column, length in enumerate((tried, accepted)):
                if length:
                    table[length - 1][column] += rounds
        for depth in reversed(range(deepest - 1)):  # a round that got further was here too
            table[depth] = [here + further for here, further in zip(table[depth], table[depth + 1], strict=True)]
        return [(tried, accepted) for tried, accepted in table]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        counts = {name: dict(getattr(self, name)) for name in ("drafted", "tried", "accepted")}
        outcomes = [[accepted, tried, rounds] for (accepted, tried), rounds in sorted(self.outcomes.items())]
        ranks = [[children, rank, times] for (children, rank), times in sorted(self.ranks.items())]
        sums = {"rounds": self.rounds, "plain": self.plain, "emitted": self.emitted}
        return {**sums, **counts, "outcomes": outcomes, "ranks": ranks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], at: str = "tally") -> Tally:
        """The inverse of `to_dict`.

        Args:
            at: its name in messages.

        Raises:
            ValueError: a key is missing or unknown, or its value is of another kind.
        """
        data = {"ranks": [], **data}
        check_keys(data, STORED, at)
        if missing := [key for key in STORED if key not in data]:
            raise ValueError(f"{at} lacks {', '.join(missing)}")
        read = {key: fit(data[key], kind, f"{at}.{key}") for key, kind in STORED.items()}
        if not all(0 <= accepted <= tried <= MOST_DEPTH for accepted, tried, _ in read["outcomes"]):
            raise ValueError(f"{at}.outcomes: 0 <= accepted <= tried <= {MOST_DEPTH} does not hold everywhere")
        pairs = {key: {(one, other): times for one, other, times in read[key]} for key in ("outcomes", "ranks")}
        counts = {key: Counter(read[key]) for key in ("drafted", "tried", "accepted")}
        return cls(
            read["rounds"], read["plain"], read["emitted"], **counts, **{k: Counter(v) for k, v in pairs.items()}
        )


STORED: dict[str, Any] = {
    **dict.fromkeys(("rounds", "plain", "emitted"), int),
    **dict.fromkeys(("drafted", "tried", "accepted"), dict[str, int]),
    **dict.fromkeys(("outcomes", "ranks"), list[tuple[int, int, int]]),
}
"""What `Tally.to_dict` writes."""
MOST_DEPTH = 1 << 20


def _ranks(finished: Round) -> list[tuple[int, int]]:
    """(children, rank of the kept child or -1) for every node of a tree at which the reviewer had to choose.

    The tip's siblings are left out if they were reordered so that a chain can continue from the tip.
    """
    draft, verdict = finished.draft, finished.verdict
    nodes = [finished.context.tip, *verdict.accepted]
    found = []
    for node, kept in zip_longest(nodes, verdict.accepted):
        children = draft.children(node)
        wanted = kept is not None or verdict.next_token is not None
        if wanted and children and (draft.tip not in children or len(children) == 1 or draft.has_drawn_siblings):
            found.append((len(children), -1 if kept is None else children.index(kept)))
    return found
