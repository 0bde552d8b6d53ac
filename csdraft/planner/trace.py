"""Measures what each drafter would draft at every place of a text that the target wrote, and what forwards cost.

The target decodes a text once, and each drafter model reads it in one forward. Then every K matrix can be replayed on
it without a model (see `csdraft.planner.expect`). Models are compared with the target token by token, with the call's
processors and noise. Drafters without a model propose after every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

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
"""Draft lengths at which a reviewer is timed."""
DEEPEST = 32
"""Tokens that drafters without a model are asked for; trees have their own depth, at most this."""
MOST_STEPS = 8
"""The most tokens that a plan lets a model write."""
STEPS = (1, 6)
"""Draft lengths that are timed to get the cost of a model's first token and of each later one."""


@dataclass(frozen=True)
class Proposal:
    """The proposal of a drafter without a model at one place: its nodes, its depth, and how many tokens were right."""

    width: int
    depth: int
    right: int


@dataclass(frozen=True)
class Trace:
    """The measurements of one text.

    Attributes:
        length: tokens that the target wrote.
        agrees: drafter model -> at each place, whether its choice is the target's.
        proposals: drafter without a model -> its proposal at each place.
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
    """Seconds of one model, or of one drafter without a model.

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
        return self.drafts.seconds(STEPS[0])

    @property
    def step(self) -> float:
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
        depths: for each drafter, the lengths that a plan may give it; a tree only has its own depth.
        models: for each drafter, whether it is a model that writes token by token, and so may review.
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
    progress: Callable[[str, float], None] = lambda what, share: None,
    enough: Callable[[int], bool] = lambda done: False,
    **options: Any,
) -> Measured:
    """Lets the target write, times it and the drafters, and compares their choices.

    Args:
        target: the model.
        drafters: largest first.
        prompts: encoded prompts of one row each.
        progress: called with what is being done and the share that is done.
        enough: called after each prompt with the number of prompts that are done; True skips the rest.
        options: options of `generate`: max_new_tokens, do_sample, temperature, ...
    """
    models = [writes(drafter) for drafter in drafters]
    costs = [Costs() for _ in drafters]
    own, traces = Costs(), []
    fresh = {"strict": True, "reuse": False, **options}
    for i, prompt in enumerate(prompts):
        progress("watching the target", i / len(prompts))
        writer = TraceWriter(drafters, costs)
        plain, began = plain_seconds(target, prompt, options), time.perf_counter()
        reviews = Lengths(WIDTHS, own, writer)
        read = frozenset(tap for drafter in drafters for tap in drafter.taps())
        target.generate(**prompt, assistant=Filler(read), schedule=reviews, **fresh)
        outside = time.perf_counter() - began - writer.seconds
        for drafter, known in zip(drafters, costs, strict=True):
            if writes(drafter):
                steps = Lengths(STEPS, known)
                target.generate(**prompt, assistant=drafter, schedule=steps, **fresh)
                known.reads[-1] -= known.first
                reviewer = Vertical(drafter.models()[0], Filler(), inner_length=max(WIDTHS))  # type: ignore[arg-type]
                target.generate(**prompt, assistant=reviewer, schedule=InnerLengths(known), **fresh)
        assert writer.trace is not None
        reads = [own.reads[-1], *(cost.reads[-1] if cost.reads else 0.0 for cost in costs)]
        traces.append(replace(writer.trace, plain=plain, outside=outside, reads=reads))
        if enough(i + 1):
            break
    depths = [lengths(drafter) for drafter in drafters]
    return Measured(traces, own, costs, models, depths)


class Beats(BaseStreamer):
    """A streamer that records the time of each token. The prompt, which comes first, counts as one token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def plain_seconds(target: Any, prompt: Mapping[str, Tensor], options: Mapping[str, Any]) -> float:
    """Seconds of plain `generate`, every token at the median time: a slow one was disturbed by something else."""
    beats, began = Beats(), time.perf_counter()
    target.generate(**prompt, **options, streamer=beats)
    total, steps = time.perf_counter() - began, [b - a for a, b in pairwise(beats.marks[1:])]
    return total - sum(steps) + len(steps) * median(steps) if steps else total


def writes(drafter: Drafter) -> bool:
    """Whether it is a model that writes token by token, and can tell its choices along a text in one forward.

    A head cannot: what it drafts after a drafted token depends on its own outputs.
    """
    return isinstance(drafter, ModelDrafter) and drafter.tree is None and not taps_of(drafter.network)


def lengths(drafter: Drafter) -> Sequence[int]:
    if writes(drafter):
        return range(1, MOST_STEPS + 1)
    return (own_depth(drafter),) if drafter.models() else WIDTHS[1:]


def own_depth(drafter: Drafter) -> int:
    """The drafter's default depth, at most `DEEPEST`."""
    return min(drafter.depth, DEEPEST)


@dataclass(frozen=True)
class Filler(Drafter):
    """Drafts the text's last token again and again: a draft of any length, for its reviewer to be timed.

    Args:
        read: hidden states of the target that the drafters, which look on, will want.
    """

    read: frozenset[int] = frozenset()

    def taps(self) -> frozenset[int]:
        return self.read

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        level = contexts[0].call.level(self)
        return [c.draft.extend(c.text.tail(1) * b.depth, level) for c, b in zip(contexts, budgets, strict=True)]


@dataclass(frozen=True)
class Lengths(Schedule):
    """Drafts some lengths in turn and records their seconds; the first round also reads the prompt.

    Args:
        lengths: the draft lengths.
        cost: where the seconds are recorded: those of scoring if there is a `writer`, else those of drafting.
        writer: makes the trace of the text at the end.
    """

    lengths: Sequence[int]
    cost: Costs
    writer: TraceWriter | None = None
    _rounds: list[int] = field(default_factory=lambda: [0])

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        if self.writer is not None:
            self.writer.call = call
        return Lengths(self.lengths, self.cost, self.writer)

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        wanted = self.lengths[self._rounds[0] % len(self.lengths)]
        return [Budget(min(wanted, room), min(wanted, room)) for room in rooms]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        self._rounds[0] += 1
        if self.writer is not None:
            self.writer.seconds += draft_seconds + score_seconds
        width = rounds[0].drafted
        if self._rounds[0] == 1:
            self.cost.reads.append(draft_seconds if self.writer is None else score_seconds)
        elif self.writer is not None:
            self.cost.reviews.add(1 + width, score_seconds)
        elif width in self.lengths:
            self.cost.drafts.add(width, draft_seconds)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.look()


@dataclass(frozen=True)
class InnerLengths(Schedule):
    """Times inner rounds with drafts of some lengths in turn; between them the target reads, as in a cascade.

    A reviewer that is asked for 1 token and has room for n + 1 runs one inner round with n drafted tokens.
    """

    cost: Costs
    _asked: list[int] = field(default_factory=list)

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        return InnerLengths(self.cost)

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        wanted, (room,) = WIDTHS[len(self._asked) % len(WIDTHS)], rooms
        self._asked.append(min(wanted, room - 1))
        return [Budget(min(1, room), min(wanted + 1, room))]

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        if len(self._asked) > 1 and self._asked[-1] >= 0:  # the first round also reads the prompt
            self.cost.reviews.add(1 + self._asked[-1], draft_seconds)


@dataclass
class TraceWriter:
    """Makes the trace of a finished call's text: what each drafter would have drafted at each place."""

    drafters: Sequence[Drafter]
    costs: Sequence[Costs]
    call: Call | None = None
    trace: Trace | None = None
    seconds: float = 0.0

    def look(self) -> None:
        began = time.perf_counter()
        assert self.call is not None
        text = self.call.texts[0]
        prompt, new = text.tokens[: text.prompt_length], text.new_tokens
        agrees, proposals = {}, {}
        for j, (drafter, cost) in enumerate(zip(self.drafters, self.costs, strict=True)):
            drafter.check(self.call)
            if writes(drafter):
                agrees[j] = self._agrees(drafter, prompt, new)
            else:
                proposals[j] = self._proposals(drafter, prompt, new, cost)
        self.trace = Trace(len(new), agrees, proposals)
        self.seconds += time.perf_counter() - began

    def _agrees(self, drafter: Any, prompt: Sequence[int], new: Sequence[int]) -> list[bool]:
        """(new,) whether the model would choose each new token of the text; it reads the text in one forward."""
        call = self.call
        assert call is not None
        draft = Draft.chain(new[:-1], call.level(drafter.network))
        (scores,) = call.session(drafter.network).score([Request(0, Text(torch.tensor(prompt)), draft)])
        return [scores.choice(node) == token for node, token in zip(range(ROOT, len(draft)), new, strict=True)]

    def _proposals(self, drafter: Drafter, prompt: Sequence[int], new: Sequence[int], cost: Costs) -> list[Proposal]:
        assert self.call is not None
        context, proposals = Context(0, Text(torch.tensor(prompt)), self.call), []
        depth = own_depth(drafter) if drafter.models() else DEEPEST
        for place, token in enumerate(new):
            began = time.perf_counter()
            (draft,) = drafter.propose([context], [Budget(depth, depth)])
            cost.drafts.add(STEPS[0], time.perf_counter() - began)
            right, node = 0, ROOT
            while place + right < len(new) and (child := draft.child(node, new[place + right])) is not None:
                right, node = right + 1, child
            proposals.append(Proposal(len(draft), max(draft.depths, default=-1) + 1, right))
            context.text.append([token])
        return proposals
