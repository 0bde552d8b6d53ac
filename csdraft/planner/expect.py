"""The expected speed of a K matrix: its rounds are replayed on texts that the target wrote, with measured seconds.

The replay is the decoding loop without the models. A draft is right up to the first place where the drafter's token is
not the target's. What a model would write after such a place is unknown. Only its time matters there, and each inner
round is assumed to gain as much as inner rounds do on average. Replaying texts beats multiplying rates because
acceptances come in runs: a text that repeats itself does so for long.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.kmatrix import KMatrix
from csdraft.planner.trace import Measured, Proposal, Trace

__all__ = ["Expectation", "expect"]


@dataclass(frozen=True)
class Expectation:
    """What to expect from one K matrix, over all texts.

    Attributes:
        tokens_per_round: block efficiency.
        speedup: over plain `generate`.
    """

    tokens_per_round: float
    speedup: float


def expect(k_matrix: KMatrix, measured: Measured) -> Expectation:
    """Replays every text of `measured` under one K matrix."""
    tokens, rounds, seconds = 0, 0, 0.0
    for trace in measured.traces:
        replay = Replay(k_matrix, measured, trace)
        replay.run()
        tokens, rounds, seconds = tokens + trace.length, rounds + replay.rounds, seconds + replay.seconds
    plain = sum(trace.plain for trace in measured.traces)
    return Expectation(tokens / rounds, plain / seconds)


@dataclass
class Drafted:
    """A draft so far: its tokens on all branches, its depth, and how many levels are the target's tokens."""

    width: int = 0
    depth: int = 0
    right: int = 0

    def add(self, width: int, depth: int, right: int) -> None:
        self.width, self.depth, self.right = self.width + width, self.depth + depth, self.right + right


class Replay:
    """The replay of one text with one K matrix.

    `run` plays the target's rounds. In each, `_draft` lets the stages of a row extend a draft: a stage proposes,
    writes token by token, or reviews the next row's drafts in inner rounds. `here` is a place in the text. It is
    None after a wrong token, where drafting costs time and is never right.
    """

    def __init__(self, k_matrix: KMatrix, measured: Measured, trace: Trace):
        self.k_matrix, self.measured, self.trace = k_matrix, measured, trace
        self.rounds, self.seconds = 0, 0.0
        self.read = [0] * len(measured.drafters)  # tokens of the text that each model has read
        self.gains = {j: (1.5, 1.0) for j in range(len(measured.drafters))}  # by reviewer: tokens gained, rounds

    def run(self) -> None:
        trace, reviews, place = self.trace, self.measured.target.reviews, 0
        used = {j for row in self.k_matrix for j, k in enumerate(row) if k}
        self.seconds = trace.outside + sum(trace.reads[1 + j] for j in used) + trace.reads[0] - reviews.seconds(1)
        while place < trace.length:
            draft = self._draft(0, place, trace.length - place - 1)
            self.seconds += reviews.seconds(1 + draft.width)
            self.rounds += 1
            place += draft.right + 1

    def _draft(self, row: int, start: int | None, room: int) -> Drafted:
        """The draft that the stages of a row write from `start` on."""
        draft, limit, size = Drafted(), 0, len(self.k_matrix)
        for j in range(row, size):
            limit += self.k_matrix[row][j]
            wanted = min(limit, room) - draft.depth
            if not self.k_matrix[row][j] or wanted <= 0:
                continue
            here = start + draft.depth if start is not None and draft.right == draft.depth else None
            if not self.measured.models[j]:
                self._propose(j, draft, here, wanted)
            elif j + 1 < size and any(self.k_matrix[j + 1]):
                self._review(j, draft, here, wanted, room)
            else:
                self._write(j, draft, here, wanted)
        return draft

    def _propose(self, j: int, draft: Drafted, here: int | None, wanted: int) -> None:
        """Adds the proposal at a place; off the path, one as large as at the text's beginning with no token right."""
        self.seconds += self.measured.drafters[j].first
        offers = self.trace.proposals[j]
        on_path = here is not None and here < len(offers)
        offer = offers[here] if on_path else Proposal(offers[0].width, offers[0].depth, 0)  # type: ignore[index]
        depth = min(offer.depth, wanted)
        draft.add(depth + (offer.width - offer.depth if depth else 0), depth, min(offer.right, depth))

    def _write(self, j: int, draft: Drafted, here: int | None, wanted: int) -> None:
        """Adds tokens that a model writes one by one."""
        cost = self.measured.drafters[j]
        self.seconds += cost.first + cost.step * (wanted - 1) + self._catch_up(j, here)
        self._take(draft, wanted, self._agreement(j, here, wanted), j, here)

    def _review(self, j: int, draft: Drafted, here: int | None, wanted: int, room: int) -> None:
        """Runs inner rounds until there are enough tokens, or no room is left."""
        reviews, gained = self.measured.drafters[j].reviews, 0
        self.seconds += self._catch_up(j, here)
        while gained < wanted and draft.depth < room:
            inner = self._draft(j + 1, here, room - draft.depth - 1)
            self.seconds += reviews.seconds(1 + inner.width)
            tokens, rounds = self.gains[j]
            if here is None:
                gain, right = max(round(tokens / rounds), 1), 0
            else:
                kept = self._agreement(j, here, inner.right)
                gain, right = kept + 1, kept + self._agreement(j, here + kept, 1)
                self.gains[j] = tokens + gain, rounds + 1
            gain = min(gain, room - draft.depth)
            self._take(draft, gain, min(right, gain), j, here)
            gained += gain
            here = here + gain if here is not None and right >= gain else None

    def _agreement(self, j: int, here: int | None, most: int) -> int:
        """How many tokens from a place on, at most `most`, the model would choose like the target."""
        if here is None:
            return 0
        ahead = self.trace.agrees[j][here : here + most]
        return next((i for i, agrees in enumerate(ahead) if not agrees), len(ahead))

    def _catch_up(self, j: int, here: int | None) -> float:
        """Extra seconds, beyond those of one token, to read what was committed since the model last drafted."""
        if here is None:
            return 0.0
        reviews = self.measured.drafters[j].reviews
        unread, self.read[j] = max(here + 1 - self.read[j], 1), here
        return reviews.seconds(min(unread, 32)) - reviews.seconds(1)

    def _take(self, draft: Drafted, depth: int, right: int, j: int, here: int | None) -> None:
        """Adds a model's own tokens; it has read all of them but the last."""
        draft.add(depth, depth, right)
        if here is not None:
            self.read[j] = here + min(right, depth - 1) + 1
