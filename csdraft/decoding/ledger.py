"""The ledger of a call: what its rounds took and came to, written by them as they happen.

Every part of a call that times or counts writes here, and nothing else keeps such numbers: rounds write how long
drafting and scoring took, sessions and readers what each model did, cascades what each of their stages cost. Schedules
read it while the call runs. The maker of the call owns its ledger: `csdraft.reports` has one that also counts what
reviewers decide, and makes a report of it. This one keeps costs only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from csdraft.decoding import clock
from csdraft.decoding.clock import Mark

if TYPE_CHECKING:
    from csdraft.decoding.interfaces import Round
    from csdraft.decoding.reader import Reader

__all__ = ["Ledger", "ModelUse"]


@dataclass
class ModelUse:
    """What one model did.

    Attributes:
        name: the model's own name.
        forwards: times it ran, whatever the batch.
        fed: tokens it read, and `rolled_back` those of them that it had to forget.
        seconds: spent in its forwards by the host's clock (an accelerator may still be at work when one returns).
        cache_bytes: the most that its keys and values took.
        recorded: shapes that are replayed, and `recorded_bytes` of the device's memory that they took.
    """

    name: str = ""
    forwards: int = 0
    fed: int = 0
    rolled_back: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0
    recorded: int = 0
    recorded_bytes: int = 0

    def note_memory(self, reader: Reader) -> None:
        """Writes down what the model's reader takes now."""
        self.cache_bytes = max(self.cache_bytes, reader.cache.bytes)
        if reader.graphs is not None:
            self.recorded, self.recorded_bytes = len(reader.graphs.shapes), reader.graphs.bytes

    def merged(self, other: ModelUse) -> ModelUse:
        """Both together; of the memory the larger."""
        return ModelUse(
            self.name if self.name == other.name else "several",
            self.forwards + other.forwards,
            self.fed + other.fed,
            self.rolled_back + other.rolled_back,
            self.seconds + other.seconds,
            max(self.cache_bytes, other.cache_bytes),
            max(self.recorded, other.recorded),
            max(self.recorded_bytes, other.recorded_bytes),
        )


class Ledger:
    """The costs of one call.

    Attributes:
        models: what each model did, by the model's id.
        seconds: in the decoding loop, from the first round to the last, without what a streamer took.
        drafting: seconds of the target's rounds that went into drafting, and `scoring` all others of them: the
            target's forward, its verdict, the schedule.
        cut: draft tokens that a K matrix asks for and that the budget, or the room in the text, did not allow.
        failure: why the drafter was left out; None if it was not.
        why: the schedule's reasons in a sentence.
        plain_step: seconds of a plain step, as far as the schedule has measured any; 0 if it has not.
        first: seconds of scoring in the first round, which also reads the prompt.
    """

    def __init__(self) -> None:
        self.models: dict[int, ModelUse] = {}
        self.seconds = self.drafting = self.scoring = 0.0
        self.cut = 0
        self.failure: str | None = None
        self.why, self.plain_step = "", 0.0
        self.first: float | None = None
        self.stages: dict[int, tuple[float, float]] = {}  # by the id of a stage's drafter
        self._started = self._began = 0.0  # the call, and its latest round
        self._paused = 0.0  # seconds
        self._drafting = self._scoring = 0.0  # of the latest round
        self._device = torch.device("cpu")
        self._drafted: tuple[Mark, Mark] | None = None  # its drafting's begin and end

    # The loop.

    def start(self, device: torch.device) -> None:
        """The first round is about to begin, on the target's device."""
        self._started, self._device = clock.now(), device

    def mark(self) -> Mark:
        """Now, as the device counts it."""
        return Mark(self._device)

    def begin(self) -> None:
        """A round of the target begins."""
        self._began, self._drafting, self._drafted = clock.now(), 0.0, None

    def drafted(self, began: Mark, ended: Mark) -> None:
        """Drafts are there, or will be when the device has come so far; the target's own round calls this last."""
        self._drafted = began, ended

    def reviewed(self, level: int, rounds: Sequence[Round]) -> None:
        """A reviewer has decided about the drafts that it was shown, which ends a round of the target's.

        Args:
            level: the reviewer's; the target's is 0.
            rounds: of one forward, without those of rows that have ended. Their scores are still there.
        """
        if level == 0:
            spent = clock.now() - self._began
            if self._drafted is not None:  # the device has drafted by now: its choices are known
                began, ended = self._drafted
                self._drafting = min(ended.since(began), spent)
            self._scoring = spent - self._drafting
            self.drafting += self._drafting
            self.scoring += self._scoring
            self.first = self._scoring if self.first is None else self.first
        self.count(level, rounds)

    @property
    def latest(self) -> tuple[float, float]:
        """Seconds of the target's latest round: of drafting, and of all else until its verdict."""
        return self._drafting, self._scoring

    def count(self, level: int, rounds: Sequence[Round]) -> None:
        """Takes down what a reviewer decided, see `reviewed`; does nothing here."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here takes no time of the call."""
        began = clock.now()
        try:
            yield
        finally:
            self._paused += clock.now() - began

    def stop(self) -> None:
        """The last round is over."""
        self.seconds = clock.now() - self._started - self._paused

    # What works for the loop.

    def model(self, model: object, name: str) -> ModelUse:
        """Where a model's forwards are counted."""
        return self.models.setdefault(id(model), ModelUse(name))

    def charge(self, drafter: object, seconds: float, tokens: float) -> None:
        """Adds to what a stage of the outermost cascade has cost, and drafted a row, so far.

        Inner ones charge nothing: their time is in the stage above them, and their drafters may be stages there too.
        """
        spent, drafted = self.stage(drafter)
        self.stages[id(drafter)] = (spent + seconds, drafted + tokens)

    def stage(self, drafter: object) -> tuple[float, float]:
        """Seconds that a stage's drafter has cost so far, and tokens that it has drafted a row."""
        return self.stages.get(id(drafter), (0.0, 0.0))
