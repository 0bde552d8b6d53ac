"""The expected speed of a K matrix: its rounds are replayed on texts that the target wrote, with measured seconds.

The replay is the decoding loop without the models. A draft is right up to the first place where the drafter's token is
not the target's. After such a place it is unknown what a model would write. Only its time matters there, and each
inner round is assumed to gain the average of inner rounds. Texts are replayed, instead of multiplying rates, because
acceptances come in runs: a text that repeats itself does so for long.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.planner.trace import Measured, Proposal, Trace

__all__ = ["Expectation", "KMatrix", "expect"]

KMatrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Expectation:
    """What to expect from one K matrix, over all texts.

    Attributes:
        tokens_per_round: block efficiency.
        seconds_per_token: time of the whole `generate` for each token.
        speedup: over plain `generate`.
    """

    tokens_per_round: float
    seconds_per_token: float
    speedup: float


def expect(k_matrix: KMatrix, measured: Measured) -> Expectation:
    """Replays every text of `measured` under one K matrix."""
    tokens, rounds, seconds = 0, 0, 0.0
    for trace in measured.traces:
        replay = Replay(k_matrix, measured, trace)
        replay.run()
        tokens, rounds, seconds = tokens + trace.length, rounds + replay.rounds, seconds + replay.seconds
    plain = sum(trace.plain for trace in measured.traces)
    return Expectation(tokens / rounds, seconds / tokens, plain / seconds)


@dataclass
class Drafted:
    """A draft so far: its tokens on all branches, its depth, and how many levels are the target's tokens."""

    width: int = 0
    depth: int = 0
    right: int = 0

    @property
    def on_path(self) -> bool:
        return self.right == self.depth


class Replay:
    """The replay of one text with one K matrix. `here` is a place in the text; None after a wrong token."""

    def __init__(self, k_matrix: KMatrix, measured: Measured, trace: Trace):
        self.k_matrix, self.measured, self.trace = k_matrix, measured, trace
        self.rounds, self.seconds = 0, 0.0
        self.read = [0] * len(measured.drafters)  # tokens of the text that each model has read
        self.gains = {j: [1.5, 1.0] for j in range(len(measured.drafters))}  # by reviewer: tokens gained, rounds

    def run(self) -> None:
        reviews, asked, place = (
            self.measured.target.reviews,
            {j for row in self.k_matrix for j, k in enumerate(row) if k},
            0,
        )
        self.seconds = self.trace.outside + sum(self.trace.reads[1 + j] for j in asked)
        while place < self.trace.length:
            draft = self._draft(0, place, self.trace.length - place - 1)
            self.seconds += reviews.seconds(1 + draft.width)
            if place == 0:
                self.seconds += self.trace.reads[0] - reviews.seconds(1)
            self.rounds += 1
            place += draft.right + 1

    def _draft(self, row: int, place: int, room: int, on_path: bool = True) -> Drafted:
        """The draft that the stages of a row write, `place` tokens into the text; off the path only its cost."""
        draft, limit = Drafted(), 0
        for j in range(row, len(self.k_matrix)):
            limit += self.k_matrix[row][j]
            wanted = min(limit, room) - draft.depth
            if self.k_matrix[row][j] and wanted > 0:
                self._stage(j, draft, place, wanted, room, on_path)
        return draft

    def _stage(self, j: int, draft: Drafted, place: int, wanted: int, room: int, on_path: bool) -> None:
        """Lets stage `j` extend `draft`."""
        here = place + draft.depth if on_path and draft.on_path else None
        if not self.measured.models[j]:
            self._propose(j, draft, here, wanted)
        elif j + 1 < len(self.k_matrix) and any(self.k_matrix[j + 1]):
            self._review(j, draft, here, wanted, room)
        else:
            cost = self.measured.drafters[j]
            self.seconds += cost.first + cost.step * (wanted - 1) + self._catch_up(j, here)
            self._take(draft, wanted, self._agreement(j, here, wanted), j, here)

    def _propose(self, j: int, draft: Drafted, here: int | None, wanted: int) -> None:
        self.seconds += self.measured.drafters[j].first
        offer = self._proposal(j, here)
        depth = min(offer.depth, wanted)
        self._add(draft, depth + (offer.width - offer.depth) * (depth > 0), depth, min(offer.right, depth), here)

    def _proposal(self, j: int, here: int | None) -> Proposal:
        """The proposal at a place; off the path, one as large as at the text's beginning with no token right."""
        proposals = self.trace.proposals[j]
        if here is not None and here < len(proposals):
            return proposals[here]
        return Proposal(proposals[0].width, proposals[0].depth, 0)

    def _review(self, j: int, draft: Drafted, here: int | None, wanted: int, room: int) -> None:
        """Runs inner rounds until there are enough tokens, or no room is left."""
        cost, gained, begun = self.measured.drafters[j], 0, here
        while gained < wanted and gained < room - draft.depth + gained:
            inner = self._draft(j + 1, here or 0, max(room - draft.depth - 1, 0), here is not None)
            self.seconds += cost.reviews.seconds(1 + inner.width) + self._catch_up(j, here if here == begun else None)
            if here is None:
                gain, right = max(round(self.gains[j][0] / self.gains[j][1]), 1), 0
            else:
                kept = self._agreement(j, here, inner.right)
                gain, right = kept + 1, kept + self._agreement(j, here + kept, 1)
                self.gains[j] = [self.gains[j][0] + gain, self.gains[j][1] + 1]
            gain = min(gain, room - draft.depth)
            self._take(draft, gain, min(right, gain), j, here)
            gained += gain
            here = here + gain if here is not None and right >= gain else None

    def _agreement(self, j: int, here: int | None, most: int) -> int:
        """How many tokens from a place on, at most `most`, the model would choose like the target."""
        if here is None:
            return 0
        agrees, count = self.trace.agrees[j], 0
        while count < most and here + count < len(agrees) and agrees[here + count]:
            count += 1
        return count

    def _catch_up(self, j: int, here: int | None) -> float:
        """Extra seconds, beyond those of one token, to read what was committed since the model last drafted."""
        if here is None:
            return 0.0
        reviews = self.measured.drafters[j].reviews
        unread, self.read[j] = max(here + 1 - self.read[j], 1), here
        return reviews.seconds(min(unread, 32)) - reviews.seconds(1)

    def _take(self, draft: Drafted, depth: int, right: int, j: int, here: int | None) -> None:
        """Adds a model's own tokens; it has read all of them but the last."""
        self._add(draft, depth, depth, right, here)
        if here is not None:
            self.read[j] = here + min(right, depth - 1) + 1

    @staticmethod
    def _add(draft: Drafted, width: int, depth: int, right: int, here: int | None) -> None:
        if here is not None:
            draft.right += right
        draft.width += width
        draft.depth += depth
