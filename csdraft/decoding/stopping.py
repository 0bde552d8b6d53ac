"""Where a text ends: `generate`'s stopping criteria, asked about every token, also inside an accepted block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

from csdraft.decoding.copies import row_copy
from csdraft.decoding.text import Text

__all__ = ["Stopping"]

STATELESS = (MaxTimeCriteria, StopStringCriteria)
"""Criteria that all rows may share."""


class Stopping:
    """Asks every stopping criterion about every emitted token; the two common ones without building a tensor.

    Args:
        criteria: what `generate` prepared.
        rows: batch size; criteria that may keep state get one copy a row.

    Attributes:
        kept: per row the (vocab,) processed scores of its tokens so far, which criteria see if they are returned.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], rows: int):
        self.max_length: int | None = None
        self.eos: frozenset[int] = frozenset()
        others = []
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length or criterion.max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.eos |= frozenset(criterion.eos_token_id.tolist())
            else:
                others.append(criterion)
        self.others: list[list[StoppingCriteria]] = [others] if others else []
        for _ in range(rows - 1 if others else 0):
            self.others.append([c if type(c) in STATELESS else row_copy(c) for c in others])
        self.kept: list[list[Tensor]] | None = None

    def for_drafters(self) -> Stopping:
        """End-of-text tokens only: a drafter need not know more to stop in time."""
        inner = Stopping([], 1)
        inner.eos = self.eos
        return inner

    def remaining(self, text: Text) -> int:
        """Tokens that may still follow `text`, at least one; a large number if there is no limit."""
        return (1 << 30) if self.max_length is None else max(self.max_length - len(text) - text.padding, 1)

    def ends(
        self, row: int, text: Text, path: Sequence[int], token: int, scores: Callable[[], list[Tensor]] | None = None
    ) -> bool:
        """Whether `token` after `text` and the uncommitted `path` is the row's last.

        Args:
            scores: makes the (vocab,) processed scores that `path` and `token` were chosen from.
        """
        ended = token in self.eos or self.remaining(text) - len(path) <= 1
        if not self.others:
            return ended
        ids, seen = text.padded([*path, token]), None
        if self.kept is not None and scores is not None:
            seen = tuple(step[None] for step in [*self.kept[row], *scores()])
        for criterion in self.others[row]:
            answer = criterion(ids, seen)  # type: ignore[arg-type]
            ended |= bool(answer.any() if isinstance(answer, Tensor) else answer)
        return ended
