"""The ledger of a call: its times and counts, written while it runs.

Every part of a call that times or counts something writes it here, and nowhere else. Rounds write how long drafting
and scoring took, sessions and readers what each model did, cascades what each stage cost. Schedules read it during the
call. This class keeps costs only; the one in `csdraft.reports` also counts what reviewers decide and makes a report.
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
        forwards: how often it ran, for any batch size.
        fed, rolled_back: tokens that it read, and how many of them its cache dropped again.
        seconds: time in its forwards by the host's clock. An accelerator may still be working when a forward returns.
        cache_bytes: the largest size of its keys and values.
        recorded, recorded_bytes: number of recorded shapes, and the device memory that they take.
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
        """Updates the memory figures from the model's reader."""
        self.cache_bytes = max(self.cache_bytes, reader.cache.bytes)
        if reader.graphs is not None:
            self.recorded, self.recorded_bytes = len(reader.graphs.shapes), reader.graphs.bytes

    def merged(self, other: ModelUse) -> ModelUse:
        """The sum of both; for memory, the larger figure."""
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
        seconds: time in the decoding loop, without the time that a streamer took.
        drafting, scoring: how the seconds of the target's rounds divide: drafting, and everything else (the target's
            forward, its verdict, the schedule).
        cut: draft tokens that a K matrix asked for but that did not fit the budget or the room in the text.
        failure: why the drafter was dropped; None if it was not.
        why: the schedule's reasons in one sentence.
        plain_step: seconds of a plain step as the schedule measured it; 0 if it measured none.
        first: seconds of scoring in the first round, which also reads the prompt.
    """

    def __init__(self) -> None:
        self.models: dict[int, ModelUse] = {}
        self.seconds = self.drafting = self.scoring = 0.0
        self.cut = 0
        self.failure: str | None = None
        self.why, self.plain_step = "", 0.0
        self.first: float | None = None
        self.stages: dict[int, tuple[float, float]] = {}  # id of a stage's drafter -> seconds, tokens
        self._charged: list[tuple[object, Mark, Mark, float]] = []  # not in `stages` yet: the device may be behind
        self._started = self._began = 0.0  # when the call and its latest round began
        self._paused = 0.0  # seconds
        self._drafting = self._scoring = 0.0  # of the latest round
        self._device = torch.device("cpu")
        self._drafted: tuple[Mark, Mark] | None = None  # when its drafting began and ended

    # The loop.

    def start(self, device: torch.device) -> None:
        """Called before the first round.

        Args:
            device: the target's.
        """
        self._started, self._device = clock.now(), device

    def mark(self) -> Mark:
        """The current moment by the device's clock."""
        return Mark(self._device)

    def begin(self) -> None:
        """Called at the start of each round of the target."""
        self._began, self._drafting, self._drafted = clock.now(), 0.0, None
        self._settle()

    def drafted(self, began: Mark, ended: Mark) -> None:
        """Called when the drafter has returned; the device may still be drafting. The target's own call comes last."""
        self._drafted = began, ended

    def reviewed(self, level: int, rounds: Sequence[Round]) -> None:
        """Called when a reviewer has decided; at level 0 this ends the target's round.

        Args:
            level: the reviewer's level; 0 is the target.
            rounds: the results of one forward, without rows that have ended. Their scores are still valid.
        """
        if level == 0:
            spent = clock.now() - self._began
            if self._drafted is not None:  # the choices are known, so the device has finished drafting
                began, ended = self._drafted
                self._drafting = min(ended.since(began), spent)
            self._scoring = spent - self._drafting
            self.drafting += self._drafting
            self.scoring += self._scoring
            self.first = self._scoring if self.first is None else self.first
        self.count(level, rounds)

    @property
    def latest(self) -> tuple[float, float]:
        """Seconds of the target's latest round: drafting, and the rest until the verdict."""
        return self._drafting, self._scoring

    def count(self, level: int, rounds: Sequence[Round]) -> None:
        """Counts what a reviewer decided (see `reviewed`). Does nothing here."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent inside does not count."""
        began = clock.now()
        try:
            yield
        finally:
            self._paused += clock.now() - began

    def stop(self) -> None:
        """Called after the last round."""
        self.seconds = clock.now() - self._started - self._paused

    # What sessions and cascades write.

    def model(self, model: object, name: str) -> ModelUse:
        """The counts of one model."""
        return self.models.setdefault(id(model), ModelUse(name))

    def charge(self, drafter: object, began: Mark, ended: Mark, tokens: float) -> None:
        """Adds the time between two marks, and drafted tokens per row, to a stage of the outermost cascade.

        Inner cascades charge nothing: their time belongs to the stage that contains them.
        """
        self._charged.append((drafter, began, ended, tokens))

    def stage(self, drafter: object) -> tuple[float, float]:
        """(seconds, drafted tokens per row) of a stage's drafter so far; for use once a round's choices are known."""
        self._settle()
        return self.stages.get(id(drafter), (0.0, 0.0))

    def _settle(self) -> None:
        """Adds what was charged to `stages`."""
        for drafter, began, ended, tokens in self._charged:
            spent, drafted = self.stages.get(id(drafter), (0.0, 0.0))
            self.stages[id(drafter)] = spent + ended.since(began), drafted + tokens
        self._charged.clear()
