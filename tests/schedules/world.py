"""A world in which schedules can be tried without models or clocks: seconds and acceptance follow given laws."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Context, Drafter, Round, Verdict
from csdraft.schedules.cost_model import WARM


@dataclass(frozen=True)
class Writer(Drafter):
    """A drafter of the world: `cost` seconds a token, each token kept with probability `accepted`."""

    cost: float
    accepted: float
    offers: float = 1.0  # how often it has anything to say
    depth: int = 5  # type: ignore[assignment]
    neural: bool = True

    def models(self):
        return [self] if self.neural else []


@dataclass(frozen=True)
class Stages(Drafter):
    """A horizontal cascade of the world."""

    writers: tuple[Writer, ...]
    limits: tuple[int, ...]

    @property
    def depth(self):
        return self.limits[-1]

    def stages(self):
        return list(zip(self.writers, self.limits, strict=True))

    def models(self):
        return [w for w in self.writers if w.neural]


class Text(list):
    """Only its length matters."""


@dataclass(eq=False)
class World:
    """One row's decoding: a target of `base` seconds a forward plus `wide` a further token.

    Unless it has run before, its first forward takes `cold` times as long.
    """

    drafter: Drafter
    base: float = 1.0
    wide: float = 0.03
    prompt: int = 200
    jitter: float = 0.0
    seed: int = 0
    cold: float = 1.0
    seconds: float = 0.0
    plain_rounds: int = 0
    depths: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.text = Text([0] * self.prompt)
        self.read: dict[int, int] = {}
        self.fed = 0
        self.target = SimpleNamespace(reader=self)
        if self.cold == 1:
            WARM.add(self)  # type: ignore[arg-type]
        self.call = SimpleNamespace(
            rows=1,
            target=self,
            sampler=SimpleNamespace(greedy=True),
            head=SimpleNamespace(processing=SimpleNamespace(temperature=1.0)),
            session=self.session,
            charges={},
        )

    def session(self, model):
        if model is self.call.target:
            return self.target
        return SimpleNamespace(unread=lambda row, text: len(self.text) - self.read.get(id(model), 0))

    def noisy(self, seconds):
        return seconds * (1 + self.jitter * (2 * self.random.random() - 1))

    def _write(self, budget):
        """(drafted, accepted, seconds) of one draft."""
        drafted = accepted = 0
        seconds, alive = 0.0, True
        for writer, limit in self.drafter.stages()[budget.skip :]:
            wanted = min(limit, budget.depth) - drafted
            if wanted <= 0 or self.random.random() >= writer.offers:
                continue
            spent = writer.cost * wanted
            if writer.neural:
                unread = len(self.text) - self.read.get(id(writer), 0)
                spent += 0.05 * writer.cost * max(unread - 1, 0)
                self.read[id(writer)] = len(self.text)
            seconds += spent
            before = self.call.charges.get(id(writer), (0.0, 0))
            self.call.charges[id(writer)] = (before[0] + spent, before[1] + wanted)
            for _ in range(wanted):
                drafted += 1
                alive = alive and self.random.random() < writer.accepted
                accepted += alive
        return drafted, accepted, seconds

    def decode(self, schedule, tokens):
        """Seconds that `tokens` new tokens took, with and without the schedule's drafts."""
        working = schedule.start(self.call, self.drafter)
        end = len(self.text) + tokens
        while len(self.text) < end:
            context = Context(0, self.text, self.call)  # type: ignore[arg-type]
            room = end - len(self.text) - 1
            (budget,) = working.budgets([context], [room], self.drafter)
            assert 0 <= budget.depth <= budget.room <= room
            drafted, accepted, drafting = self._write(budget) if budget.depth else (0, 0, 0.0)
            self.depths.append(budget.depth)
            self.plain_rounds += not drafted
            unread = len(self.text) - self.read.get(id(self), 0)
            self.read[id(self)] = len(self.text) + accepted
            self.fed += unread + drafted
            score = self.noisy(self.base + self.wide * (unread - 1 + drafted))
            score, self.cold = score * self.cold, 1.0
            draft = Draft.chain([0] * drafted)
            verdict = Verdict(list(range(accepted)), 0, len(self.text) + accepted + 1 >= end)
            finished = Round(context, draft, verdict, 0, None)  # type: ignore[arg-type]
            self.text.extend(finished.tokens)
            drafting = self.noisy(drafting)
            self.seconds += drafting + score
            working.observe([finished], drafting, score)
        working.finish()
        return self.seconds


def plain_seconds(world: World, tokens: int) -> float:
    """What the same tokens cost without drafting."""
    return tokens * world.base + world.wide * (world.prompt - 1)
