"""What the next round would take: the target's forward, drafting, and text that drafter models must still read.

All prices are in seconds, from measurements where there are any. `update` looks them up for the rows and text lengths
of one round. A shape that was never run is priced like the nearest known one (see `csdraft.tables.costs`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Context, Drafter
from csdraft.tables.costs import Costs, Way, Widths

__all__ = ["UNREAD", "Prices", "unread"]

MODEL_COST = 0.15
"""Cost of a drafted token before it is measured, in plain steps of the target."""
READING_COST = 0.05
"""Cost of reading a token of text, as a share of the cost of drafting one."""
UNREAD = 16
"""If a drafter has more text than this to read, its time says nothing about the cost of a drafted token."""
TRUSTED = 4
"""A width with fewer measurements may turn out cheaper: optimistic estimates count half of its extra cost."""


class Prices:
    """The prices of one call.

    Args:
        call: the call.
        stages: the drafters that write a draft in turn, each with the depth where it ends (`Drafter.stages`).
        costs: what was measured so far.

    Attributes:
        forwards: seconds of the target's forward by its number of queries.
        plain: seconds of a plain step, which drafts nothing.
        token: (stages,) seconds of a drafted token.
    """

    def __init__(self, call: Call, stages: Sequence[tuple[Drafter, int]], costs: Costs):
        self.call, self.stages, self.costs = call, stages, costs
        self.reader = call.session(call.target).reader
        self.ends = [end for _, end in stages[:-1]]  # where each stage hands over to the next
        self.forwards, self.plain, self.token = Widths(), 0.0, [0.0] * len(stages)
        self._widths: dict[Way, list[int]] = {}

    def update(self, contexts: Sequence[Context]) -> None:
        """Looks up the prices for these rows."""
        self.forwards = self.costs.widths(len(contexts), max(len(context.text) for context in contexts))
        self.plain = self.forwards.seconds(1)
        self.token = [self._token(stage) for stage in range(len(self.stages))]

    def _token(self, stage: int) -> float:
        """Seconds of a token that a stage drafts; before it is measured, what `prepare` measured, or a guess."""
        models = self.stages[stage][0].models()
        if not models:
            return self.costs.token(stage, 0.0)
        prepared = self.call.session(models[0]).reader.costs  # type: ignore[arg-type]
        least = min((seconds for shape, seconds in prepared.items() if shape.queries == 1), default=None)
        return self.costs.token(stage, MODEL_COST * self.plain if least is None else least)

    # The target's forward.

    def forward(self, width: int, optimistic: bool = False) -> float:
        """Seconds of the target's forward over `width` tokens of each row; optimistic: less if rarely measured."""
        queries = self.reader.queries(width)
        seconds = self.forwards.seconds(queries)
        return (seconds + self.plain) / 2 if optimistic and self.forwards.count(queries) < TRUSTED else seconds

    # Drafts.

    def stage_of(self, skip: int, i: int) -> int:
        """The stage that writes draft token `i` if the first `skip` stages are left out."""
        return max(skip, bisect_right(self.ends, i))

    def widths(self, way: Way, most: int) -> list[int]:
        """(> most,) by depth, the tokens that the target reviews: more than the depth if drafts branch."""
        skip, size = way
        widths = self._widths.setdefault(way, [0])
        for i in range(len(widths) - 1, most):
            stage = self.stage_of(skip, i)
            start = self.ends[stage - 1] if stage > skip else 0
            width = self.stages[stage][0].width(i + 1 - start)
            widths.append(widths[start] + (width if size is None or stage > skip else min(width, size)))
        return widths

    def reading(self, skip: int, contexts: Sequence[Context]) -> float:
        """Seconds for drafter models to read the text that they have not read yet, without the first `skip` stages."""
        return READING_COST * max(unread(self.call, self.stages[skip:], contexts) - 2, 0) * max(self.token[skip:])


def unread(call: Call, stages: Sequence[tuple[Drafter, int]], contexts: Sequence[Context]) -> int:
    """The most tokens of a text that a stage's model has not read yet; 0 without models."""
    models = [model for stage, _ in stages for model in stage.models()[:1]]
    sessions = [call.session(model) for model in models]  # type: ignore[arg-type]
    return max((session.unread(c.row, c.text) for session in sessions for c in contexts), default=0)
