"""Cost model: drafts the amount that pays most, by measured seconds and acceptance; none where drafting does not pay.

Leviathan et al. (arXiv 2211.17192, section 3.3) choose the draft length from one acceptance rate and one cost ratio.
This schedule measures both while it decodes. Before each round it compares plans. A plan says how many of a cascade's
leading stages to leave out (an expensive drafter may not pay where a cheap one does), which size of tree to draft, and
how deep. It takes the plan with the most expected tokens per second,

    (1 + sum over i <= depth of survival[i]) / (target seconds at width depth + 1 + drafting seconds).

Drafting nothing is always one of the plans.

* `survival[i]` is the chance that draft token i is kept. It is learned separately for each `Drafter.evidence`.
* Seconds are those of warm forwards, by shape. A shape that was never run is priced like the nearest known one, and a
  wider one a little higher. So drafts are tried from the first round on.
* A plan that does not pay is tried again from time to time, after longer and longer pauses.

The drafter remembers what was learned for its next call. This is the default schedule; use `fixed` to compare methods
at equal length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.decoding.limits import check_range
from csdraft.decoding.states import cost_label
from csdraft.schedules._plans import MARGIN, Group, Plan, plans_by_depth, reason
from csdraft.schedules._prices import UNREAD, Prices, unread
from csdraft.tables.costs import STREAK, Costs, Learned, Survival, Way

__all__ = ["CostModel"]

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Depths to choose from. There are few, because each is another shape of forward, whose first run is slow."""
PROVEN = 2.0
"""A plan that looks this many times faster than plain decoding is taken before the plain step was measured."""
PATIENCE = 3
"""After this many rounds a plain step is run to measure it, unless a plan is proven."""
FIRST_DEPTH, FIRST_COPY = 2, 8
"""The largest depth of the first draft, of models and of other drafters. Trials of other stages draft FIRST_DEPTH."""
TRIAL_PAUSE = 16.0
"""The pause after a trial, in multiples of the trial's cost; doubled after each lost trial."""
MOST_DOUBLINGS = 6
"""The pause between trials stops growing after this many losses."""
CARRIED = 0.8
"""Share of the survival counts that the next call starts with. Texts change, so it is below 1; costs do not change."""
BLURRED = 0.5
"""Share of the survival counts that are kept when a trial goes well: the text has changed."""
MIXED = -1
"""Stands for the evidence of a batch, whose rows have different evidence."""
LONE_DEPTH = 20
"""The largest depth of a single drafter, unless twice its own depth is more."""
HORIZON = 64
"""Tokens within which a new shape must make up for its slow first run."""
LEARNING, SETTLED_FOR = 8, 4
"""A choice holds for one round, and for one more with every LEARNING rounds learned from, until SETTLED_FOR: comparing
plans takes some 2 % of a tiny model's round."""


@dataclass(frozen=True)
class CostModel(Schedule):
    """Chooses stages and depth each round by expected tokens per second (see the module).

    Args:
        most: the largest depth; None: a cascade's own limit, or for a single drafter 20 or twice `Drafter.depth`.
        remember: whether calls learn from the drafter's earlier calls with the same target.
    """

    most: int | None = None
    remember: bool = True

    def __post_init__(self) -> None:
        if self.most is not None:
            check_range("a cost_model schedule", self, 1, "; None leaves it to the drafter", most=None)

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return CostModelRun(self, call, drafter)


class CostModelRun(Schedule):
    """One call's cost model.

    Before a round, `budgets` compares the plans of every way to draft (`_plans_of`; yields come from `_plans.py`,
    seconds from `_prices.py`). `_choose` takes the best plan, a plain step, or a trial of another way. After the
    round, `observe` learns how many tokens were kept, by evidence and way, and what the forward and each stage took.
    """

    def __init__(self, options: CostModel, call: Call, drafter: Drafter):
        self.options, self.call, self.drafter = options, call, drafter
        self.stages = drafter.stages()
        self.ways = [
            Way(skip, size) for skip, (stage, _) in enumerate(self.stages) for size in stage.sizes() or (None,)
        ]
        limit, lone = self.stages[-1][1], len(self.stages) == 1
        self.most = options.most or (max(2 * limit, LONE_DEPTH) if lone else limit)
        self.depths = sorted({depth for depth in DEPTHS if depth < self.most} | {self.most})

        self.key = (CostModel, call.rows, call.sampler.greedy, call.chooser.processing.temperature)
        self.learned = drafter.memory.load(call.target, self.key, self._saved) if options.remember else Learned()
        for survival in self.learned.survivals.values():
            survival.fade(CARRIED)
        self.prices = Prices(call, self.stages, self.learned.costs)
        self.learned.costs.add_prepared(self.prices.reader.costs.items())

        # The current round.
        self.evidence: list[int] = []  # (rows,)
        self.kind = MIXED  # the evidence of a single row, or MIXED; each kind has its own choices
        self.way, self.depth, self.is_trial = self.ways[0], 0, False
        self.asked: list[int] = []  # (rows,) tokens asked for
        self.reads_much = False  # whether a drafter model must first read much text
        # The rounds so far.
        self.rounds, self.rounds_of = 0, Counter[int]()  # all; by kind
        self.plans: dict[int, list[Plan]] = {}  # kind -> the plans compared last
        self._settled: dict[int, tuple[Way, int, int]] = {}  # kind -> way, depth, rounds for which both still hold
        self._known: dict[tuple[int, Way], Survival] = {}  # since the last draft
        self._streaky = bool(drafter.models())  # models are right, or wrong, in stretches
        self._kept_all: set[int] = set()  # rows that kept all of the last draft, if streaky
        self._predicting: set[Way] = set()  # ways with a drafter that predicts its own yield (`Drafter.expected`)
        self._charged = [(0.0, 0.0)] * len(self.stages)  # (stages,) seconds and tokens up to the last round

    def _saved(self) -> Learned:
        """What a drafter's first call starts from: the costs that its cascade saved for this target and device."""
        saved = self.drafter.memory.saved
        table = saved.get(cost_label(self.call.target)) if saved else None
        return Learned(Costs.from_list(table)) if table else Learned()

    # What to draft.

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        self.evidence = [self.drafter.evidence(c) + (STREAK if c.row in self._kept_all else 0) for c in contexts]
        self.kind = kind = self.evidence[0] if len(contexts) == 1 else MIXED
        self.rounds_of[kind] += 1
        self.is_trial = False
        self.way, self.depth, holds = self._settled.get(kind, (self.ways[0], 0, 0))
        if not holds:
            self.prices.update(contexts)
            self.way, self.depth = self._choose(contexts, max(rooms) + 1)
            settled = not self.is_trial and kind != MIXED and not self._predicting
            holds = min(1 + self.learned.rounds // LEARNING, SETTLED_FOR) if settled else 1
        self._settled[kind] = (self.way, self.depth, holds - 1)
        skip, size = self.way
        self.reads_much = self.depth > 0 and unread(self.call, self.stages[skip:], contexts) > UNREAD
        self.asked = [min(self.depth, room) for room in rooms]
        if len(self.stages) == 1:  # a single drafter may return more than `depth`, such as a window of guesses
            both = zip(self.asked, rooms, strict=True)
            return [Budget(depth, room if depth else 0, size=size) for depth, room in both]
        return [Budget(depth, depth, skip, size) for depth in self.asked]

    def _choose(self, contexts: Sequence[Context], remaining: int) -> tuple[Way, int]:
        """The way and depth of the next rounds; depth 0 is a plain step.

        All plans are compared, and the best must clearly beat a plain step. A best plan that is not twice as fast must
        wait until the plain step was measured once. Another way may get a trial instead of the best plan.

        Args:
            contexts: one for each row.
            remaining: the most tokens that a row still writes.
        """
        plain = self.prices.plain
        plans = [plan for way in self.ways for plan in self._plans_of(way, contexts, remaining)]
        survivals = {way: self._survival(self.kind, way) for way in self.ways if way not in self._predicting}
        self.plans[self.kind] = plans
        best = max(plans, key=lambda plan: self._preference(plan, remaining), default=None)
        if best is not None and best.rate * plain < MARGIN:
            best = None
        unproven = best is not None and best.rate * plain < PROVEN and not self.prices.forwards.known(1)
        if unproven and self.rounds >= PATIENCE:
            return self.ways[0], 0
        if (trial := self._trial(survivals, best, contexts, remaining)) is not None:
            self.is_trial = True
            return trial
        return (best.way, best.depth) if best else (self.ways[0], 0)

    def _preference(self, plan: Plan, remaining: int) -> float:
        """The plan's rate, less the slow first run of a new shape; slightly more if the shape's price is known."""
        forwards, queries = self.prices.forwards, self.prices.reader.queries(plan.width)
        once = forwards.first_run(queries) * plan.tokens / min(remaining, HORIZON)
        return plan.tokens / (plan.seconds + once) * (MARGIN if forwards.known(queries) else 1.0)

    # The plans of one way.

    def _plans_of(self, way: Way, contexts: Sequence[Context], remaining: int, optimistic: bool = False) -> list[Plan]:
        """One plan for each depth with this way; a single plan if the drafter predicts its own yield.

        Depths grow slowly: the largest is about twice the largest that was asked for before.
        """
        if (predicted := self._predicted(way, contexts, remaining)) is not None:
            return [predicted]
        known = [(self._survival(evidence, way), self.evidence.count(evidence)) for evidence in set(self.evidence)]
        first = FIRST_DEPTH if self.stages[way.skip][0].models() else FIRST_COPY
        most = min(self.most, 2 * max(len(survival.asked) for survival, _ in known) + first, remaining - 1)
        depths = [depth for depth in self.depths if depth <= most]
        groups = [Group(rows, s.survival_rates(most, optimistic), s.shares_offered(most)) for s, rows in known]
        reading = self.prices.reading(way.skip, contexts) / remaining
        return plans_by_depth(way, depths, groups, self.prices, reading, optimistic)

    def _predicted(self, way: Way, contexts: Sequence[Context], remaining: int) -> Plan | None:
        """The plan of a drafter that predicts its own yield (`Drafter.expected`); None for other drafters."""
        stage, depth = self.stages[way.skip][0], min(self.most, remaining - 1)
        if way.size is None or depth < 1:
            return None
        found = [stage.expected(context, depth, way.size) for context in contexts]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        self._predicting.add(way)
        width = 1 + max([nodes for _, nodes in known])
        tokens = 1 + sum([tokens for tokens, _ in known]) / len(known)
        return Plan(way, depth, tokens, self.prices.forward(width), width)

    def _survival(self, evidence: int, way: Way) -> Survival:
        """What is known about drafting this way with this evidence; computed once a round."""
        if (evidence, way) not in self._known:
            self._known[evidence, way] = self.learned.survival(evidence, way)
        return self._known[evidence, way]

    # Trials of other ways.

    def _trial(
        self, survivals: dict[Way, Survival], best: Plan | None, contexts: Sequence[Context], remaining: int
    ) -> tuple[Way, int] | None:
        """Another way to try in this round, and its depth; None if no trial is due.

        A way's trial is due after its pause, and made only if the way could still win. The pause is for all tree sizes
        of the same stages, unless these are the best plan's stages.
        """
        rate = best.rate if best else 1 / self.prices.plain
        for way, survival in survivals.items():
            if best and way == best.way:
                survival.losses, survival.wait = 0, 0.0
            elif survival.wait <= 0:
                self._pause(way, survival, contexts)
                same_stages = best is not None and best.way.skip == way.skip
                for other in survivals if not same_stages else ():
                    if other.skip == way.skip:
                        survivals[other].wait = max(survivals[other].wait, survival.wait)
                if self._could_win(way, rate, contexts, remaining):
                    return way, best.depth if best and same_stages else min(FIRST_DEPTH, self.most)
        return None

    def _pause(self, way: Way, survival: Survival, contexts: Sequence[Context]) -> None:
        """Sets a way's pause until its next trial: longer for expensive trials, and doubled after each loss."""
        prices, depth = self.prices, min(FIRST_DEPTH, self.most)
        forward = prices.forward(1 + prices.widths(way, depth)[depth])
        cost = prices.reading(way.skip, contexts) + depth * prices.token[way.skip] + forward - prices.plain
        survival.losses = min(survival.losses + 1, MOST_DOUBLINGS)
        survival.wait = TRIAL_PAUSE * 2.0 ** (survival.losses - 1) * max(cost, 0.1 * prices.plain)

    def _could_win(self, way: Way, rate: float, contexts: Sequence[Context], remaining: int) -> bool:
        """Whether a way could beat `rate` at best, with enough text left to make up for what its models must read."""
        if remaining * self.prices.plain <= 2 * TRIAL_PAUSE * self.prices.reading(way.skip, contexts):
            return False
        return any(plan.rate > rate for plan in self._plans_of(way, contexts, remaining, optimistic=True))

    # What the rounds showed.

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        learned, reader = self.learned, self.prices.reader
        self.rounds += 1
        learned.rounds += 1
        learned.costs.add(len(rounds), reader.shape.queries, reader.shape.slots, score_seconds, reader.warm)
        for survival in learned.survivals.values():
            survival.wait -= draft_seconds + score_seconds
        if self.depth == 0:
            return
        self._known.clear()
        if self.is_trial and sum(r.accepted for r in rounds) == sum(self.asked):  # promising: try again at once
            learned.survival(self.kind, self.way).wait = 0.0
            for evidence in set(self.evidence):
                learned.survival(evidence, self.way).fade(BLURRED)
        for r, asked, evidence in zip(rounds, self.asked, self.evidence, strict=True):
            learned.survivals.setdefault((evidence, self.way), Survival()).add(asked, r.depth, r.accepted)
            if self._streaky and r.depth:
                (self._kept_all.add if r.accepted == r.depth else self._kept_all.discard)(r.context.row)
        self._learn_drafting(max(r.depth for r in rounds), draft_seconds)

    def _learn_drafting(self, depth: int, draft_seconds: float) -> None:
        """Learns the seconds per token of every stage that drafted; a single drafter is charged all of them."""
        charged = [(draft_seconds, depth)]
        if len(self.stages) > 1:
            now = [self.call.ledger.stage(drafter) for drafter, _ in self.stages]
            charged = [(a - c, b - d) for (a, b), (c, d) in zip(now, self._charged, strict=True)]
            self._charged = now
        for stage, (seconds, tokens) in enumerate(charged):
            if tokens and not self.reads_much:
                self.learned.costs.add_token(stage, seconds / tokens)

    def finish(self) -> None:
        if self.options.remember:
            self.drafter.memory.save(self.call.target, self.key, self.learned)

    # For the report.

    def plain_seconds(self) -> float:
        prices = self.prices.forwards
        return prices.seconds(1) if prices.known(1) else 0.0

    def why(self) -> str:
        kind = max(self.plans, key=lambda kind: self.rounds_of[kind], default=MIXED)
        alike, rounds, plans = self.rounds_of[kind], self.rounds_of.total(), self.plans.get(kind)
        said = reason(plans, self.prices.forwards.seconds(1)) if plans else ""
        return f"in {alike} of {rounds} rounds {said}" if said and alike < rounds else said
