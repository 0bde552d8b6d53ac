"""A simulated world to test schedules without models or clocks: seconds and acceptance follow given rules."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from math import log2
from types import SimpleNamespace

from csdraft.decoding.draft import Draft
from csdraft.decoding.inputs import Shape
from csdraft.decoding.interfaces import Context, Drafter, Round, Verdict
from csdraft.decoding.ledger import Ledger


@dataclass(frozen=True)
class Writer(Drafter):
    """A drafter of the world: `cost` seconds a token, each token kept with probability `accepted`."""

    cost: float
    accepted: float
    offers: float = 1.0  # how often it drafts anything
    depth: int = 5  # type: ignore[assignment]
    neural: bool = True
    kinds: tuple[tuple[float, float], ...] = ()  # by evidence: how often there is such, and its tokens' chance
    trees: tuple[int, ...] = ()  # sizes that it can draft; each doubling fails a quarter less often

    def sizes(self):
        return self.trees

    def width(self, depth):
        return min(4 * depth, self.trees[0]) if self.trees else depth

    def chance(self, size):
        return 1 - (1 - self.accepted) * 0.75 ** log2(size / 4) if size else self.accepted

    def models(self):
        return [self] if self.neural else []

    def evidence(self, context):
        return context.call.world.kind or 0


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
class Device:
    """A device with its own clock. A forward takes `base` seconds, `wide` for each query after the first, and `second`
    if there is more than one query.

    Args:
        jitter: the largest relative error of a forward's time.
        cold: the very first forward takes this many times as long.
        new: the first forward of each number of queries takes this many times as long.
        outliers: the share of forwards that take five times as long.
        neighbour: another program runs for this many seconds, then pauses as long; while it runs, all takes twice as
            long.
    """

    base: float = 1.0
    wide: float = 0.03
    second: float = 0.0
    jitter: float = 0.0
    cold: float = 1.0
    new: float = 1.0
    outliers: float = 0.0
    neighbour: float = 0.0
    now: float = 0.0
    ran: set[int] = field(default_factory=set)

    def run(self, queries: int, seed: random.Random) -> tuple[float, bool]:
        """(seconds, whether it was warm) of one forward."""
        seconds, warm = self.base + self.wide * (queries - 1) + self.second * (queries > 1), queries in self.ran
        seconds *= self.cold if not self.ran else 1.0 if warm else self.new
        self.ran.add(queries)
        return self.pass_time(seconds * (1 + 4 * (seed.random() < self.outliers)), seed), warm

    def pass_time(self, seconds: float, seed: random.Random) -> float:
        """Seconds that so much work takes now; the clock advances."""
        seconds *= 1 + self.jitter * (2 * seed.random() - 1)
        if self.neighbour and self.now % (2 * self.neighbour) < self.neighbour:
            seconds *= 2
        self.now += seconds
        return seconds


@dataclass(eq=False)
class World:
    """One row's decoding, on a device."""

    drafter: Drafter
    device: Device = field(default_factory=Device)
    prompt: int = 200
    seed: int = 0
    seconds: float = 0.0
    plain_rounds: int = 0
    depths: list[int] = field(default_factory=list)
    sizes: list[int | None] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        places = random.Random(self.seed)  # luck belongs to places of the text, and is the same for all schedules
        self.luck = [(places.random(), places.random(), places.random()) for _ in range(self.prompt + 2048)]
        self.text = Text([0] * self.prompt)
        self.read: dict[int, int] = {}
        self.kind: int | None = None
        self.shape, self.warm, self.costs = Shape(1, 0, 0), False, {}
        self.target = SimpleNamespace(reader=self)
        self.call = SimpleNamespace(
            rows=1,
            target=self,
            sampler=SimpleNamespace(greedy=True),
            chooser=SimpleNamespace(processing=SimpleNamespace(temperature=1.0)),
            session=self.session,
            ledger=Ledger(),
            world=self,
        )

    def queries(self, wanted):
        return wanted

    def session(self, model):
        if model is self.call.target:
            return self.target
        return SimpleNamespace(
            unread=lambda row, text: len(self.text) - self.read.get(id(model), 0), reader=SimpleNamespace(costs={})
        )

    def _write(self, budget):
        """(drafted, accepted, seconds) of one draft."""
        drafted = accepted = 0
        seconds, alive = 0.0, True
        if self.kind is not None and not self.kind:
            return 0, 0, 0.0
        for writer, limit in self.drafter.stages()[budget.skip :]:
            wanted = min(limit, budget.depth) - drafted
            if wanted <= 0 or self.luck[len(self.text)][0] >= writer.offers:
                continue
            spent = writer.cost * wanted
            if writer.neural:
                unread = len(self.text) - self.read.get(id(writer), 0)
                spent += 0.05 * writer.cost * max(unread - 1, 0)
                self.read[id(writer)] = len(self.text)
            seconds += spent
            began, ended = self.call.ledger.mark(), self.call.ledger.mark()
            ended.host = began.host + spent
            self.call.ledger.charge(writer, began, ended, wanted)
            for _ in range(wanted):
                chance = writer.kinds[self.kind - 1][1] if self.kind else writer.chance(budget.size)
                alive = alive and self.luck[len(self.text) + drafted][1] < chance
                drafted += 1
                accepted += alive
        return drafted, accepted, seconds

    def _evidence(self):
        """The evidence of this round: 0 if the drafter drafts nothing, None if it has no kinds of evidence."""
        chance = self.luck[len(self.text)][2]
        for kind, (share, _) in enumerate(getattr(self.drafter, "kinds", ()), 1):
            if chance < share:
                return kind
            chance -= share
        return 0 if getattr(self.drafter, "kinds", ()) else None

    def decode(self, schedule, tokens):
        """Seconds in which `tokens` new tokens are written under a schedule."""
        run = schedule.start(self.call, self.drafter)
        end = len(self.text) + tokens
        while len(self.text) < end:
            self.kind = self._evidence()
            context = Context(0, self.text, self.call)  # type: ignore[arg-type]
            room = end - len(self.text) - 1
            (budget,) = run.budgets([context], [room], self.drafter)
            assert 0 <= budget.depth <= budget.room <= room
            drafted, accepted, drafting = self._write(budget) if budget.depth else (0, 0, 0.0)
            self.depths.append(budget.depth)
            self.sizes.append(budget.size if budget.depth else None)
            self.plain_rounds += not drafted
            unread = len(self.text) - self.read.get(id(self), 0)
            self.read[id(self)] = len(self.text) + accepted
            drafting = self.device.pass_time(drafting, self.random)
            nodes = min(self.drafter.width(drafted), budget.size or drafted) if drafted else 0
            self.shape = Shape(1, unread + nodes, len(self.text) + nodes)
            score, self.warm = self.device.run(unread + nodes, self.random)
            draft = Draft.chain([0] * drafted)
            verdict = Verdict(list(range(accepted)), 0, len(self.text) + accepted + 1 >= end)
            finished = Round(context, draft, verdict, 0, None)  # type: ignore[arg-type]
            self.text.extend(finished.tokens)
            self.seconds += drafting + score
            run.observe([finished], drafting, score)
        run.finish()
        return self.seconds
