"""Cost model: draft as much as pays, by measured seconds and measured acceptance; fall back to plain decoding.

Leviathan et al. (arXiv 2211.17192, section 3.3) choose the draft length from one acceptance rate and one cost ratio;
this schedule measures both while it decodes. Of the leading stages of a cascade to leave out (a dear drafter may not
pay where the statistical one below it does) and of the depths, it takes the pair with the most tokens a second,

    (1 + sum over i <= depth of survival[i]) / (target seconds at width depth + 1 + drafting seconds),

where nothing drafted is always a candidate. Survival is learned apart for each kind of evidence that a statistical
drafter can show before anything is drafted (how long a match it has): where it has much to copy it may be the best on
its own, and where it has nothing a model is worth its price. What does not pay is tried again ever more rarely. Costs
and survival are kept for the next call with the same models. It is the default; use `fixed` to compare methods at
equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from torch import nn

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.tables.costs import Ledger, Memory, Survival

__all__ = ["CostModel"]

MODEL_COST = 0.15
"""A drafter token's cost before it is measured, in target steps."""
READING_COST = 0.05
"""Reading a token of text costs a model this share of drafting one."""
MARGIN = 1.01
"""What drafting must promise over plain decoding: timing noise decides below that."""
FIRST_DEPTH, TRIAL_PAUSE = 2, 8.0
"""Depth of a first or repeated trial; the pause after it, in units of what it costs, doubled after each loss."""
MOST_DOUBLINGS = 6
"""The pause between trials stops growing after so many losses."""
CARRIED = 0.8
"""Share of a call's survival counts that the next call starts from: costs last, texts change."""
BLURRED = 0.7
"""Share of its counts that stages left out keep from one pause to the next: texts change."""
UNREAD = 16
"""With more text to read than this, a drafter's time says nothing about its cost a token."""
MIXED = -1
"""Evidence of a batch, whose rows have their own: its trials are counted apart."""
LONE_DEPTH = 20
"""A lone drafter may draft so many tokens where its drafts survive, however few it likes by itself."""
FAR = 16
"""Tokens of a prompt from which on its forward says what wide drafts cost."""
LEARNING, SETTLED_FOR = 16, 4
"""After so many rounds, a choice stands for so many."""


def _bucket(width: int) -> int:
    """Prompt lengths, coarsely, so that a table of them stays small."""
    return 1 << max(width - 1, 1).bit_length()


Hazards = Callable[[Survival, int], list[float]]


MEMORY = Memory()
WARM: WeakSet[nn.Module] = WeakSet()
"""Targets that have run in this process."""


def clear_memory() -> None:
    """Forgets what earlier calls have learned."""
    MEMORY.clear()


@dataclass(frozen=True)
class CostModel(Schedule):
    """Chooses stages and depth each round by expected tokens a second (see the module).

    Args:
        most: the largest depth; None leaves it to the drafter: a cascade's limits, 20 or twice
            `Drafter.depth` for a single drafter.
        remember: whether calls learn from earlier calls with the same models.
    """

    most: int | None = None
    remember: bool = True

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ValueError(f"most={self.most} must be at least 1, or None for what the drafter likes")

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return Working(self, call, drafter)


class Working(Schedule):
    """One call's cost model."""

    def __init__(self, options: CostModel, call: Call, drafter: Drafter):
        self.options, self.call, self.drafter = options, call, drafter
        self.stages = drafter.stages()
        self.limits = [limit for _, limit in self.stages]
        self.key = (call.rows, call.sampler.greedy, call.head.processing.temperature, drafter.signature())
        self.ledger = MEMORY.load(call.target, drafter.models(), self.key) if options.remember else Ledger()
        for survival in self.ledger.survivals.values():
            survival.fade(CARRIED)
        self.most = options.most or (self.limits[-1] if len(self.stages) > 1 else max(2 * self.limits[-1], LONE_DEPTH))
        self._widths = [[0] for _ in self.stages]
        self.rounds = self.skip = self.depth = 0
        self.evidence: list[int] = []  # by row
        self._asked: list[int] = []
        self._settled: dict[int, tuple[int, int, int]] = {}  # by evidence: skip, depth, rounds that this stands for
        self._reads = self._trial = False
        self._charged = [(0.0, 0.0)] * len(self.stages)

    # What to draft.

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        self.evidence = [self.drafter.evidence(context) for context in contexts]
        self._trial = False
        kind = self.evidence[0] if len(contexts) == 1 else MIXED
        self.skip, self.depth, more = self._settled.get(kind, (0, 0, 0))
        if more <= 0:
            self.skip, self.depth = self._choose(kind, contexts, max(rooms) + 1)
            settled = self.rounds > LEARNING and not self._trial and kind != MIXED
            more = SETTLED_FOR if settled else 1
        self._settled[kind] = (self.skip, self.depth, more - 1)
        self._reads = self.depth > 0 and self._unread(self.skip, contexts) > UNREAD
        self._asked = [min(self.depth, room) for room in rooms]
        if len(self.stages) == 1:  # what a drafter adds of its own accord, such as a window, is its own affair
            return [Budget(depth, room if depth else 0) for depth, room in zip(self._asked, rooms, strict=True)]
        return [Budget(depth, depth, skip=self.skip) for depth in self._asked]

    def _choose(self, kind: int, contexts: Sequence[Context], remaining: int) -> tuple[int, int]:
        """Leading stages to leave out, and depth, for the next rounds."""
        target = self.ledger.target
        if not target.known(1):  # two short drafts from the cheapest stage, then a plain step: what drafting must beat
            return (0, 0) if self.rounds >= 2 else (len(self.stages) - 1, min(FIRST_DEPTH, self.most))
        plain = target.seconds(1)
        best = (MARGIN / plain, -1, 0)
        survivals = [self.ledger.survival(kind, skip) for skip in range(len(self.stages))]  # keep count of trials
        for skip in range(len(self.stages)):
            rate, depth = self._best_depth(skip, contexts, remaining)
            best = max(best, (rate, skip, depth))
        for skip, stages in enumerate(survivals):
            if skip == best[1]:
                stages.losses, stages.wait = 0, 0.0
            elif stages.wait <= 0 and self._worth_a_trial(skip, stages, best[0], contexts, remaining):
                self._trial = True
                return skip, min(FIRST_DEPTH, self.most)
        return max(best[1], 0), best[2]

    def _worth_a_trial(
        self, skip: int, stages: Survival, rate: float, contexts: Sequence[Context], remaining: int
    ) -> bool:
        """Whether stages that are not the best choice could be: a trial costs, so each loss doubles the pause."""
        plain, depth = self.ledger.target.seconds(1), min(FIRST_DEPTH, self.most)
        reading = self._reading_seconds(skip, contexts)
        price = reading + depth * self._token_seconds(skip) + self.ledger.target.seconds(1 + depth) - plain
        stages.losses = min(stages.losses + 1, MOST_DOUBLINGS)
        stages.wait = TRIAL_PAUSE * 2.0 ** (stages.losses - 1) * max(price, 0.1 * plain)
        hopeful, _ = self._best_depth(skip, contexts, remaining, Survival.hopes)
        for evidence in set(self.evidence):
            self.ledger.survival(evidence, skip).fade(BLURRED)
        return hopeful > rate and remaining * plain > 2 * TRIAL_PAUSE * reading

    def _best_depth(
        self, skip: int, contexts: Sequence[Context], remaining: int, hazards: Hazards = Survival.hazards
    ) -> tuple[float, int]:
        """Tokens a second and row, and the depth that gives the most, when the first `skip` stages are left out."""
        target, rows = self.ledger.target, len(contexts)
        counts = [(self.ledger.survival(e, skip), self.evidence.count(e)) for e in set(self.evidence)]
        most = min(self.most, 2 * max(len(stages.asked) for stages, _ in counts) + 2, remaining - 1)
        reading, widths = self._reading_seconds(skip, contexts), self._draft_widths(skip, most)
        seconds, tokens, best = target.seconds(1), 1.0, (0.0, 0)
        chances = [(hazards(stages, most), stages.shares_offered(most), number) for stages, number in counts]
        survival = [1.0] * len(counts)
        for i in range(most):
            short = 1.0  # the chance that no row is offered token i: nothing gets wider
            for k, (hazard, share, number) in enumerate(chances):
                survival[k] *= hazard[i]
                tokens += survival[k] * number / rows
                short *= (1 - share[i]) ** number
            wider = target.seconds(1 + widths[i + 1]) - target.seconds(1 + widths[i])
            seconds += (1 - short) * (wider + self._token_seconds(self._stage_at(skip, i)))
            rate = 1 / (seconds / tokens + reading / remaining)
            best = max(best, (rate, i + 1))
        return best

    def _stage_at(self, skip: int, i: int) -> int:
        """The stage that writes draft token `i`."""
        return next((s for s in range(skip, len(self.limits)) if i < self.limits[s]), len(self.limits) - 1)

    def _draft_widths(self, skip: int, most: int) -> list[int]:
        """(> most,) tokens under review when the stages from `skip` on draft so deep: more if they branch."""
        widths = self._widths[skip]
        for i in range(len(widths) - 1, most):
            stage = self._stage_at(skip, i)
            start = self.limits[stage - 1] if stage > skip else 0
            widths.append(widths[start] + self.stages[stage][0].width(i + 1 - start))
        return widths

    def _token_seconds(self, stage: int) -> float:
        known = self.ledger.token_seconds.get(stage)
        if known is None:
            return MODEL_COST * self.ledger.target.seconds(1) if self.stages[stage][0].models() else 0.0
        return known

    def _reading_seconds(self, skip: int, contexts: Sequence[Context]) -> float:
        """What the drafter models must read first, once."""
        dearest = max((self._token_seconds(stage) for stage in range(skip, len(self.stages))), default=0.0)
        return READING_COST * max(self._unread(skip, contexts) - 2, 0) * dearest

    def _unread(self, skip: int, contexts: Sequence[Context]) -> int:
        """Tokens of text that the drafter models have not seen yet."""
        models = [model for stage, _ in self.stages[skip:] for model in stage.models()[:1]]
        sessions = [self.call.session(model) for model in models]  # type: ignore[arg-type]
        return max((session.unread(c.row, c.text) for session in sessions for c in contexts), default=0)

    # What came of it.

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        ledger, drafted = self.ledger, max(r.drafted for r in rounds)
        self.rounds += 1
        if self.rounds > 1:
            ledger.target.add(1 + drafted, score_seconds)
        else:
            self._learn_far(len(rounds), score_seconds)
        for survival in ledger.survivals.values():
            survival.wait -= draft_seconds + score_seconds
        if self.depth == 0:
            return
        if self._trial and sum(r.accepted for r in rounds) == sum(self._asked):  # promising: try again at once
            ledger.survival(self.evidence[0] if len(rounds) == 1 else MIXED, self.skip).wait = 0.0
        for r, asked, evidence in zip(rounds, self._asked, self.evidence, strict=True):
            ledger.survival(evidence, self.skip).add(asked, r.depth, r.accepted)
        self._learn_costs(max(r.depth for r in rounds), draft_seconds)

    def _learn_far(self, rows: int, seconds: float) -> None:
        """The first round also reads the prompt: a far point, without which wide drafts look dearer than they are.

        If it is far. A model's first forward in a process is slow as no other is, and says nothing.
        """
        target = self.call.target
        width = _bucket(self.call.session(target).runner.fed // rows)
        if target in WARM and width >= FAR:
            self.ledger.target.add(width, seconds)
        WARM.add(target)

    def _learn_costs(self, depth: int, draft_seconds: float) -> None:
        """Seconds a level of every stage that drafted: what its cascade charged, or all for a lone drafter."""
        charged = [(draft_seconds, depth)]
        if len(self.stages) > 1:
            now = [self.call.charges.get(id(drafter), (0.0, 0)) for drafter, _ in self.stages]
            charged = [(a - c, b - d) for (a, b), (c, d) in zip(now, self._charged, strict=True)]
            self._charged = now
        for stage, (seconds, tokens) in enumerate(charged):
            if tokens and not self._reads:
                old = self.ledger.token_seconds.get(stage, seconds / tokens)
                self.ledger.token_seconds[stage] = 0.8 * old + 0.2 * seconds / tokens

    def finish(self) -> None:
        if self.options.remember:
            MEMORY.save(self.call.target, self.drafter.models(), self.key, self.ledger)
