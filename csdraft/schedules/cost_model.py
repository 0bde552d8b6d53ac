"""Cost model: drafts the amount that pays most, by measured seconds and acceptance; none where drafting does not pay.

Leviathan et al. (arXiv 2211.17192, section 3.3) choose the draft length from one acceptance rate and one cost ratio.
This schedule measures both while it decodes. Before each round it compares plans. A plan says how many of a cascade's
leading stages to leave out (an expensive drafter may not pay where a cheap one does), which size of tree to draft, and
how deep. It takes the plan with the most expected tokens a second,

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

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.decoding.reader import place
from csdraft.tables.costs import STREAK, Costs, Learned, Survival, Way, Widths

__all__ = ["CostModel"]

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Depths to choose from, and the largest. They are few: each is another shape, slow to run once, to be measured."""
MODEL_COST = 0.15
"""Cost of a drafted token before it is measured, in plain steps of the target."""
READING_COST = 0.05
"""Cost of reading a token of text, as a share of the cost of drafting one."""
MARGIN = 1.02
"""A plan must look this many times faster than plain decoding. With less, timing noise would decide."""
PROVEN = 2.0
"""If a plan looks this many times faster than plain decoding, the plain step need not be measured."""
PATIENCE = 3
"""Rounds after which a plain step is made to measure it, if there was none yet."""
FIRST_DEPTH, FIRST_COPY = 2, 8
"""The largest depth of the first draft of a model, and of other drafters. A trial has the first depth too."""
TRIAL_PAUSE = 16.0
"""The pause after a trial, in multiples of the trial's cost; doubled after each lost trial."""
MOST_DOUBLINGS = 6
"""The pause between trials stops growing after this many losses."""
TRUSTED = 4
"""A width with fewer measurements may turn out cheaper: optimistic estimates count half of its extra cost."""
CARRIED = 0.8
"""Share of the survival counts that the next call starts with. Texts change, so it is below 1; costs do not change."""
BLURRED = 0.5
"""Share of the survival counts that are kept when a trial goes well: the text has changed."""
UNREAD = 16
"""If a drafter has more text than this to read, its time says nothing about the cost of a drafted token."""
MIXED = -1
"""Stands for the evidence of a whole batch: its rows have different evidence."""
LONE_DEPTH = 20
"""The largest depth of a single drafter, unless twice its own depth is more."""
HORIZON = 64
"""Tokens within which a new shape must make up for its slow first run."""
LEARNING, SETTLED_FOR = 16, 4
"""After LEARNING rounds, a choice is kept for SETTLED_FOR rounds before plans are compared again."""


@dataclass(frozen=True)
class CostModel(Schedule):
    """Chooses stages and depth each round by expected tokens a second (see the module).

    Args:
        most: the largest depth; None leaves it to the drafter: a cascade's limits, 20 or twice
            `Drafter.depth` for a single drafter.
        remember: whether calls learn from the drafter's earlier calls with the same target.
    """

    most: int | None = None
    remember: bool = True

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ValueError(f"most={self.most} must be at least 1, or None for what the drafter likes")

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return CostModelRun(self, call, drafter)


@dataclass(frozen=True)
class Plan:
    """One way and depth to draft, and what a round with it is expected to yield and cost.

    Attributes:
        way: leading stages left out, and size of the tree.
        tokens: expected emitted tokens of a row.
        seconds: for drafting, the target's forward, and a share of reading the text.
        width: tokens of a row in the target's forward.
    """

    way: Way
    depth: int
    tokens: float
    seconds: float
    width: int = 1

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class CostModelRun(Schedule):
    """One call's cost model."""

    def __init__(self, options: CostModel, call: Call, drafter: Drafter):
        self.options, self.call, self.drafter = options, call, drafter
        self.stages = drafter.stages()
        self.limits = [limit for _, limit in self.stages]
        self.ways = [
            Way(skip, size) for skip, (stage, _) in enumerate(self.stages) for size in stage.sizes() or (None,)
        ]
        self.key = (CostModel, call.rows, call.sampler.greedy, call.chooser.processing.temperature)
        self.learned = drafter.memory.load(call.target, self.key, self._fresh) if options.remember else Learned()
        self.reader = call.session(call.target).reader
        self.learned.costs.add_prepared(self.reader.costs.items())
        for survival in self.learned.survivals.values():
            survival.fade(CARRIED)
        self._streaky = bool(drafter.models())
        self.most = options.most or (self.limits[-1] if len(self.stages) > 1 else max(2 * self.limits[-1], LONE_DEPTH))
        self.depths = sorted({depth for depth in DEPTHS if depth < self.most} | {self.most})
        self.prices = Widths()
        self._draft_widths = {way: [0] for way in self.ways}
        self._telling: set[Way] = set()  # ways with a drafter that predicts its own yield (`Drafter.expected`)
        self.rounds, self.way, self.depth = 0, self.ways[0], 0
        self.evidence: list[int] = []  # by row
        self._whole: set[int] = set()  # rows that kept all of the last draft: models are right, or wrong, in stretches
        self._asked: list[int] = []  # by row: the depth that was asked for
        self._settled: dict[int, tuple[Way, int, int]] = {}  # by evidence: way, depth, rounds that both still hold
        self._reads = self._trial = False  # whether the drafter has much text to read; whether this round is a trial
        self._charged = [(0.0, 0.0)] * len(self.stages)  # by stage: seconds and tokens up to the last round
        self._known: dict[tuple[int, Way], Survival] = {}
        self._plans: dict[int, list[Plan]] = {}  # by evidence: the plans that were last compared
        self._kinds: Counter[int] = Counter()  # rounds by evidence

    def _fresh(self) -> Learned:
        """For a drafter's first call: the costs that its cascade saved for this target and device."""
        saved = self.drafter.memory.saved
        saved = saved.get(place(self.call.target)) if saved else None
        return Learned(Costs.from_list(saved)) if saved else Learned()

    # What to draft.

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        self.evidence = [
            self.drafter.evidence(context) + (STREAK if context.row in self._whole else 0) for context in contexts
        ]
        self._trial = False
        kind = self.evidence[0] if len(contexts) == 1 else MIXED
        self._kinds[kind] += 1
        self.way, self.depth, more = self._settled.get(kind, (self.ways[0], 0, 0))
        if more <= 0:
            self.prices = self.learned.costs.widths(len(contexts), max(len(context.text) for context in contexts))
            self.way, self.depth = self._choose(kind, contexts, max(rooms) + 1)
            settled = self.rounds > LEARNING and not self._trial and kind != MIXED and not self._telling
            more = SETTLED_FOR if settled else 1
        self._settled[kind] = (self.way, self.depth, more - 1)
        skip, size = self.way
        self._reads = self.depth > 0 and self._unread(skip, contexts) > UNREAD
        self._asked = [min(self.depth, room) for room in rooms]
        if len(self.stages) == 1:  # a single drafter may return more than `depth`, such as a window of guesses
            both = zip(self._asked, rooms, strict=True)
            return [Budget(depth, room if depth else 0, size=size) for depth, room in both]
        return [Budget(depth, depth, skip, size) for depth in self._asked]

    def _choose(self, kind: int, contexts: Sequence[Context], remaining: int) -> tuple[Way, int]:
        """The way and depth of the next rounds: those of the best plan, those of a trial, or a plain step."""
        plain = self.prices.seconds(1)
        plans = [plan for way in self.ways for plan in self._compared(way, contexts, remaining)]
        survivals = {way: self._survival(kind, way) for way in self.ways if way not in self._telling}  # count trials
        self._plans[kind] = plans
        best = max(plans, key=lambda plan: self._preference(plan, remaining), default=None)
        if best is None or best.rate * plain < MARGIN:
            best = None
        elif best.rate * plain < PROVEN and self.rounds >= PATIENCE and not self.prices.known(1):
            return self.ways[0], 0  # measures the plain step, which drafts must beat
        rate = best.rate if best else 1 / plain
        for way, survival in survivals.items():
            if best and way == best.way:
                survival.losses, survival.wait = 0, 0.0
            elif survival.wait <= 0:
                same_stages = best is not None and best.way.skip == way.skip
                could_win = self._worth_a_trial(way, survival, rate, contexts, remaining)
                for other in self.ways if not same_stages else ():  # its trees of other sizes pause too
                    if other.skip == way.skip:
                        survivals[other].wait = max(survivals[other].wait, survival.wait)
                if could_win:
                    self._trial = True
                    return way, best.depth if best and same_stages else min(FIRST_DEPTH, self.most)
        return (best.way, best.depth) if best else (self.ways[0], 0)

    def _worth_a_trial(
        self, way: Way, survival: Survival, rate: float, contexts: Sequence[Context], remaining: int
    ) -> bool:
        """Whether another way could turn out to beat `rate`; also sets the pause until the way's next trial."""
        plain, depth = self.prices.seconds(1), min(FIRST_DEPTH, self.most)
        reading = self._reading_seconds(way.skip, contexts)
        width = 1 + self._widths(way, depth)[depth]
        price = reading + depth * self._token_seconds(way.skip) + self._seconds(width) - plain
        survival.losses = min(survival.losses + 1, MOST_DOUBLINGS)
        survival.wait = TRIAL_PAUSE * 2.0 ** (survival.losses - 1) * max(price, 0.1 * plain)
        could_win = max((plan.rate for plan in self._compared(way, contexts, remaining, optimistic=True)), default=0.0)
        return could_win > rate and remaining * plain > 2 * TRIAL_PAUSE * reading

    def _compared(self, way: Way, contexts: Sequence[Context], remaining: int, optimistic: bool = False) -> list[Plan]:
        """One plan for each depth with this way; a single plan if the drafter predicts its own yield."""
        if (told := self._told(way, contexts, remaining)) is not None:
            return [told]
        skip = way.skip
        counts = [(self._survival(e, way), self.evidence.count(e)) for e in set(self.evidence)]  # (survival, rows)
        first = FIRST_DEPTH if self.stages[skip][0].models() else FIRST_COPY
        most = min(self.most, 2 * max(len(known.asked) for known, _ in counts) + first, remaining - 1)
        reading, widths = self._reading_seconds(skip, contexts), self._widths(way, most)
        drafting = [self._token_seconds(stage) for stage in range(len(self.stages))]
        chances = [
            (known.survival_rates(most, optimistic), known.shares_offered(most), number) for known, number in counts
        ]
        survival, tokens, plans, before = [1.0] * len(counts), 1.0, [], 0
        seconds = wide = self._seconds(1)
        for depth in self.depths:
            if depth > most:
                break
            short, spent = 1.0, 0.0  # short: the chance that no row's draft gets this deep, so that nothing is added
            for k, (chance, share, number) in enumerate(chances):
                for i in range(before, depth):
                    survival[k] *= chance[i]
                    tokens += survival[k] * number / len(contexts)
                short *= (1 - share[depth - 1]) ** number
            for i in range(before, depth):
                spent += drafting[self._stage_at(skip, i)]
            narrow, wide = wide, self._seconds(1 + widths[depth], optimistic)
            seconds += (1 - short) * (wide - narrow + spent)
            plans.append(Plan(way, depth, tokens, seconds + tokens * reading / remaining, 1 + widths[depth]))
            before = depth
        return plans

    def _told(self, way: Way, contexts: Sequence[Context], remaining: int) -> Plan | None:
        """The plan of a drafter that predicts its own yield (`Drafter.expected`); None for other drafters."""
        stage, depth = self.stages[way.skip][0], min(self.most, remaining - 1)
        if way.size is None or depth < 1:
            return None
        found = [stage.expected(context, depth, way.size) for context in contexts]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        self._telling.add(way)
        nodes = max(nodes for _, nodes in known)
        tokens = 1 + sum(tokens for tokens, _ in known) / len(known)
        return Plan(way, depth, tokens, self._seconds(1 + nodes), 1 + nodes)

    def _preference(self, plan: Plan, remaining: int) -> float:
        """The plan's rate, less the slow first run of a new shape; slightly more if the shape's price is known."""
        width = self._queries(plan.width)
        once = self.prices.first_run(width) * plan.tokens / min(remaining, HORIZON)
        return plan.tokens / (plan.seconds + once) * (MARGIN if self.prices.known(width) else 1.0)

    def _survival(self, evidence: int, way: Way) -> Survival:
        """What is known about drafting this way with this evidence; computed once a round."""
        if (evidence, way) not in self._known:
            self._known[evidence, way] = self.learned.survival(evidence, way)
        return self._known[evidence, way]

    # Prices.

    def _queries(self, width: int) -> int:
        """How many queries the target's forward over `width` tokens has."""
        return self.reader.queries(width)

    def _seconds(self, width: int, optimistic: bool = False) -> float:
        """Seconds of the target's forward over `width` tokens; optimistic: less if it was rarely measured."""
        width = self._queries(width)
        price, plain = self.prices.seconds(width), self.prices.seconds(1)
        return (price + plain) / 2 if optimistic and self.prices.count(width) < TRUSTED else price

    def _stage_at(self, skip: int, i: int) -> int:
        """The stage that writes draft token `i`."""
        return max(skip, min(bisect_right(self.limits, i), len(self.limits) - 1))

    def _widths(self, way: Way, most: int) -> list[int]:
        """(> most,) by depth: the tokens that the target reviews, which are more than the depth if stages branch."""
        widths, (skip, size) = self._draft_widths[way], way
        for i in range(len(widths) - 1, most):
            stage = self._stage_at(skip, i)
            start = self.limits[stage - 1] if stage > skip else 0
            width = self.stages[stage][0].width(i + 1 - start)
            widths.append(widths[start] + (width if size is None or stage > skip else min(width, size)))
        return widths

    def _token_seconds(self, stage: int) -> float:
        models = self.stages[stage][0].models()
        return self.learned.costs.token(stage, self._model_seconds(models[0]) if models else 0.0)

    def _model_seconds(self, model: object) -> float:
        """Seconds of a drafter model's forward before it has drafted: as `prepare` measured, or a usual value."""
        known = self.call.session(model).reader.costs  # type: ignore[arg-type]
        least = min((cost for shape, cost in known.items() if shape.queries == 1), default=None)
        return MODEL_COST * self.prices.seconds(1) if least is None else least

    def _reading_seconds(self, skip: int, contexts: Sequence[Context]) -> float:
        """Seconds that the drafter models take to read the text that they have not read yet; paid once."""
        slowest = max((self._token_seconds(stage) for stage in range(skip, len(self.stages))), default=0.0)
        return READING_COST * max(self._unread(skip, contexts) - 2, 0) * slowest

    def _unread(self, skip: int, contexts: Sequence[Context]) -> int:
        """Tokens of text that the drafter models have not read yet."""
        models = [model for stage, _ in self.stages[skip:] for model in stage.models()[:1]]
        sessions = [self.call.session(model) for model in models]  # type: ignore[arg-type]
        return max((session.unread(c.row, c.text) for session in sessions for c in contexts), default=0)

    # What the rounds showed.

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        learned, reader = self.learned, self.reader
        self.rounds += 1
        learned.costs.add(len(rounds), reader.shape.queries, reader.shape.slots, score_seconds, reader.warm)
        for survival in learned.survivals.values():
            survival.wait -= draft_seconds + score_seconds
        if self.depth == 0:
            return
        self._known.clear()
        if self._trial and sum(r.accepted for r in rounds) == sum(self._asked):  # promising: try again at once
            learned.survival(self.evidence[0] if len(rounds) == 1 else MIXED, self.way).wait = 0.0
            for evidence in set(self.evidence):
                learned.survival(evidence, self.way).fade(BLURRED)
        for r, asked, evidence in zip(rounds, self._asked, self.evidence, strict=True):
            learned.survival(evidence, self.way).add(asked, r.depth, r.accepted)
            if self._streaky and r.depth:
                (self._whole.add if r.accepted == r.depth else self._whole.discard)(r.context.row)
        self._learn_costs(max(r.depth for r in rounds), draft_seconds)

    def _learn_costs(self, depth: int, draft_seconds: float) -> None:
        """Learns the seconds a token of every stage that drafted; a single drafter is charged all of them."""
        charged = [(draft_seconds, depth)]
        if len(self.stages) > 1:
            now = [self.call.ledger.stage(drafter) for drafter, _ in self.stages]
            charged = [(a - c, b - d) for (a, b), (c, d) in zip(now, self._charged, strict=True)]
            self._charged = now
        for stage, (seconds, tokens) in enumerate(charged):
            if tokens and not self._reads:
                self.learned.costs.add_token(stage, seconds / tokens)

    def finish(self) -> None:
        if self.options.remember:
            self.drafter.memory.save(self.call.target, self.key, self.learned)

    def plain_seconds(self) -> float:
        return self.prices.seconds(1) if self.prices.known(1) else 0.0

    def why(self) -> str:
        kind = max(self._plans, key=lambda kind: self._kinds[kind], default=MIXED)
        alike, rounds, plans = self._kinds[kind], self._kinds.total(), self._plans.get(kind)
        said = reason(plans, self.prices.seconds(1)) if plans else ""
        return f"in {alike} of {rounds} rounds {said}" if said and alike < rounds else said


def reason(plans: Sequence[Plan], plain: float) -> str:
    """One sentence on the best of the plans that were compared, and the next deeper one.

    Args:
        plain: seconds of a plain step.
    """

    def yields(plan: Plan) -> str:
        return f"{plan.tokens:.1f} tokens a step at {plan.seconds / plain:.1f} steps' cost"

    best = max(plans, key=lambda plan: plan.rate)
    if best.rate * plain < MARGIN:
        return f"drafting does not pay: drafts of {best.depth} would give {yields(best)}"
    deeper = next((plan for plan in plans if plan.way == best.way and plan.depth > best.depth), None)
    stages = "stage" if best.way.skip == 1 else f"{best.way.skip} stages"
    left_out = f" without the first {stages}" if best.way.skip else ""
    size = f" in trees of {best.way.size}" if best.way.size else ""
    said = f"drafts of {best.depth}{size}{left_out} pay: {yields(best)}"
    return f"{said}; drafts of {deeper.depth} would give {yields(deeper)}" if deeper else said
