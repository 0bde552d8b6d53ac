"""Measures what each drafter would draft at every place of a text that the target wrote, and what forwards cost.

The target decodes a text once, and each drafter model reads it in one forward. Then every K matrix can be replayed on
it without a model (see `csdraft.planner.expect`). A model is compared with the target token by token, with the call's
processors and noise. Other drafters propose after every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from csdraft.bench import TokenTimes
from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.feature_session import taps_of
from csdraft.decoding.interfaces import Budget, Context, Drafter, Request, Round, Schedule
from csdraft.decoding.reported import unreported
from csdraft.decoding.text import Text
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.vertical import Vertical
from csdraft.tables.costs import Widths

__all__ = ["Costs", "Measured", "Proposal", "Trace", "measure_drafters"]

WIDTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Draft lengths at which a reviewer is timed; drafters without a model propose up to the largest."""
MOST_STEPS = 8
"""The most tokens that a plan lets a model write."""
STEPS = (1, 6)
"""Draft lengths that are timed to get the cost of a model's first token and of each later one."""


@dataclass(frozen=True)
class Proposal:
    """What a drafter proposes at one place: number of nodes, depth, and how many tokens the target agrees with."""

    width: int
    depth: int
    right: int


@dataclass(frozen=True)
class Trace:
    """The measurements of one text.

    Attributes:
        length: tokens that the target wrote.
        agrees: drafter -> at each place, whether its choice is the target's; of models that write token by token.
        proposals: drafter -> its proposal at each place; of all other drafters.
        plain: seconds of plain `generate`.
        outside: seconds of csdraft's `generate` outside rounds.
        reads: seconds to read the prompt, for the target and then for each drafter.
    """

    length: int
    agrees: Mapping[int, Sequence[bool]]
    proposals: Mapping[int, Sequence[Proposal]]
    plain: float = 0.0
    outside: float = 0.0
    reads: Sequence[float] = ()


@dataclass
class Costs:
    """Seconds of the target, or of a drafter.

    Attributes:
        reviews: seconds of a round's forward and verdict, by the number of tokens that it reads.
        drafts: seconds of drafting, by the number of tokens; for a drafter without a model, of one proposal.
        reads: seconds of the first round of each text, which reads the prompt.
    """

    reviews: Widths = field(default_factory=Widths)
    drafts: Widths = field(default_factory=Widths)
    reads: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds of a draft's first token."""
        return self.drafts.seconds(STEPS[0])

    @property
    def step(self) -> float:
        """Seconds of each later token."""
        if not self.drafts.known(STEPS[1]):
            return 0.0
        return max(self.drafts.seconds(STEPS[1]) - self.first, 0.0) / (STEPS[1] - STEPS[0])


@dataclass(frozen=True)
class Measured:
    """All measurements that planning needs.

    Attributes:
        traces: one for each text.
        target: the target's costs.
        drafters: each drafter's costs, largest drafter first.
        models: for each drafter, whether it is a model that writes token by token, and so may review.
        depths: for each drafter, the lengths that a plan may give it.
    """

    traces: Sequence[Trace]
    target: Costs
    drafters: Sequence[Costs]
    models: Sequence[bool]
    depths: Sequence[Sequence[int]]


@unreported()
def measure_drafters(
    target: Any,
    drafters: Sequence[Drafter],
    prompts: Sequence[Mapping[str, Tensor]],
    enough: Callable[[int], bool] = lambda done: False,
    **options: Any,
) -> Measured:
    """Lets the target write, times it and the drafters, and compares their choices.

    Args:
        drafters: largest first.
        prompts: encoded prompts of one row each.
        enough: called after each prompt with the number of prompts that are done; True skips the rest.
        options: of `generate`: max_new_tokens, do_sample, temperature, ...
    """
    own, costs, traces = Costs(), [Costs() for _ in drafters], []
    fresh = {"strict": True, "reuse": False, **options}
    for i, prompt in enumerate(prompts):
        plain, began = plain_seconds(target, prompt, options), time.perf_counter()
        reviews = TargetTimer(own, drafters, costs)
        taps = frozenset(tap for drafter in drafters for tap in drafter.taps())
        target.generate(**prompt, assistant=Filler(taps), schedule=reviews, **fresh)
        outside = time.perf_counter() - began - reviews.seconds
        for drafter, cost in zip(drafters, costs, strict=True):
            if writes(drafter):
                target.generate(**prompt, assistant=drafter, schedule=DraftTimer(cost), **fresh)
                cost.reads[-1] -= cost.first
                reviewer = Vertical(drafter.models()[0], Filler(), inner_length=WIDTHS[-1])  # type: ignore[arg-type]
                target.generate(**prompt, assistant=reviewer, schedule=InnerTimer(cost), **fresh)
        reads = [own.reads[-1], *(cost.reads[-1] if cost.reads else 0.0 for cost in costs)]
        agrees, proposals = reviews.compared
        traces.append(Trace(len(reviews.new), agrees, proposals, plain, outside, reads))
        if enough(i + 1):
            break
    return Measured(traces, own, costs, [*map(writes, drafters)], [*map(lengths, drafters)])


def plain_seconds(target: Any, prompt: Mapping[str, Tensor], options: Mapping[str, Any]) -> float:
    """Seconds of plain `generate`, every token at the median time: a slow one was disturbed by something else."""
    times, began = TokenTimes(), time.perf_counter()
    target.generate(**prompt, **options, streamer=times)
    total, steps = time.perf_counter() - began, [b - a for a, b in pairwise(times.marks[1:])]
    return total - sum(steps) + len(steps) * median(steps) if steps else total


def writes(drafter: Drafter) -> bool:
    """Whether it is a model that writes token by token, and can tell its choices along a text in one forward.

    A head cannot: what it drafts after a drafted token depends on its own outputs.
    """
    return isinstance(drafter, ModelDrafter) and drafter.tree is None and not taps_of(drafter.network)


def lengths(drafter: Drafter) -> Sequence[int]:
    """The draft lengths that a plan may give a drafter; trees and heads only have their own depth."""
    if writes(drafter):
        return range(1, MOST_STEPS + 1)
    return (min(drafter.depth, WIDTHS[-1]),) if drafter.models() else WIDTHS[1:]


@dataclass(frozen=True)
class Filler(Drafter):
    """Repeats the text's last token: a draft of any length, so that its reviewer can be timed.

    Args:
        read: hidden states of the target that other drafters need when they look at the text.
    """

    read: frozenset[int] = frozenset()

    def taps(self) -> frozenset[int]:
        return self.read

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        level = contexts[0].call.level(self)
        return [c.draft.extend(c.text.tail(1) * b.depth, level) for c, b in zip(contexts, budgets, strict=True)]


# Schedules that ask for some lengths in turn and record what they take, each for one call of one row.


class DraftTimer(Schedule):
    """Times drafts of a model at `STEPS`."""

    lengths: Sequence[int] = STEPS

    def __init__(self, cost: Costs):
        self.cost, self.rounds = cost, 0

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        length = min(self.lengths[self.rounds % len(self.lengths)], *rooms)
        return [Budget(length, length)]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self.rounds += 1
        width = rounds[0].drafted
        if self.rounds == 1:
            self.cost.reads.append(draft_seconds)
        elif width in self.lengths:
            self.cost.drafts.add(width, draft_seconds)


class InnerTimer(DraftTimer):
    """Times a reviewer's inner rounds; between them the target reads, as in a cascade.

    A reviewer that is asked for 1 token and has room for n + 1 runs one inner round with n drafted tokens.
    """

    lengths = WIDTHS

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        (room,) = rooms
        self.width = min(self.lengths[self.rounds % len(self.lengths)] + 1, room)  # tokens that the reviewer reads
        return [Budget(min(1, room), self.width)]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self.rounds += 1
        if self.rounds > 1 and self.width:  # the first round also reads the prompt
            self.cost.reviews.add(self.width, draft_seconds)


class TargetTimer(DraftTimer):
    """Times the target's reviews, and at the end compares every drafter with the text that the target wrote.

    Attributes:
        seconds: of all rounds, and of the comparison.
        prompt, new: token ids of the text.
        compared: `Trace.agrees` and `Trace.proposals`.
    """

    lengths = WIDTHS

    def __init__(self, cost: Costs, drafters: Sequence[Drafter], costs: Sequence[Costs]):
        super().__init__(cost)
        self.drafters, self.costs, self.seconds = drafters, costs, 0.0

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        self.call = call
        return self

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self.rounds += 1
        self.seconds += draft_seconds + score_seconds
        if self.rounds == 1:
            self.cost.reads.append(score_seconds)
        else:
            self.cost.reviews.add(1 + rounds[0].drafted, score_seconds)

    def finish(self) -> None:
        began = time.perf_counter()
        text = self.call.texts[0]
        self.prompt, self.new = text.tokens[: text.prompt_length], text.new_tokens
        agrees, proposals = self.compared = {}, {}
        for j, (drafter, cost) in enumerate(zip(self.drafters, self.costs, strict=True)):
            drafter.check(self.call)
            if writes(drafter):
                agrees[j] = self._agrees(drafter)
            else:
                proposals[j] = self._proposals(drafter, cost)
        self.seconds += time.perf_counter() - began

    def _agrees(self, drafter: Any) -> list[bool]:
        """(new,) whether the model would choose each new token of the text; it reads the text in one forward."""
        draft = Draft.chain(self.new[:-1], self.call.level(drafter.network))
        request = Request(0, Text(torch.tensor(self.prompt, device="cpu")), draft)
        (scores,) = self.call.session(drafter.network).score([request])
        return [scores.choice(node) == token for node, token in zip(range(ROOT, len(draft)), self.new, strict=True)]

    def _proposals(self, drafter: Drafter, cost: Costs) -> list[Proposal]:
        """(new,) what the drafter proposes before each new token, and how much of it the target wrote next."""
        context, proposals = Context(0, Text(torch.tensor(self.prompt, device="cpu")), self.call), []
        depth = lengths(drafter)[-1]
        for place, token in enumerate(self.new):
            began = time.perf_counter()
            (draft,) = drafter.propose([context], [Budget(depth, depth)])
            cost.drafts.add(STEPS[0], time.perf_counter() - began)
            right, node = 0, ROOT
            while place + right < len(self.new) and (child := draft.child(node, self.new[place + right])) is not None:
                right, node = right + 1, child
            proposals.append(Proposal(len(draft), max(draft.depths, default=-1) + 1, right))
            context.text.append([token])
        return proposals
