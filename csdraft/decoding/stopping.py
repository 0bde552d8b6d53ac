"""Decides where a text ends: applies `generate`'s stopping criteria to every token, also inside an accepted draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from csdraft.decoding.text import Text

__all__ = ["Stopping"]

KNOWN = (MaxTimeCriteria, StopStringCriteria)
"""Criteria that treat each row alone and keep no state."""


class Stopping:
    """Applies every stopping criterion to every emitted token; the two common ones without building a tensor.

    Args:
        criteria: the criteria that `generate` prepared.
        eos: tokens that end a text, beside those of the criteria.

    Attributes:
        max_length: the most tokens of a row, with its padding; None: no limit.
        eos: all tokens that end a text.
        pads: whether an ended row is filled up with padding while others continue. Without a criterion for end-of-text
            tokens, plain `generate` lets such a row continue.
        known, custom: the other criteria: those in `KNOWN`, and the rest.
        kept: by row, the (vocab,) processed scores of its tokens so far; criteria get them if the call returns scores.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], eos: frozenset[int] = frozenset()):
        self.criteria = StoppingCriteriaList(criteria)
        self.max_length: int | None = None
        self.eos = eos
        self.known: list[StoppingCriteria] = []
        self.custom: list[StoppingCriteria] = []
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length or criterion.max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.eos |= frozenset(criterion.eos_token_id.tolist())
            else:
                (self.known if type(criterion) in KNOWN else self.custom).append(criterion)
        self.pads = any("eos_token_id" in dir(criterion) for criterion in criteria)  # as plain `generate` decides
        self.kept: list[list[Tensor]] | None = None

    def for_drafters(self) -> Stopping:
        """End-of-text tokens only, which is all that a drafter needs."""
        return Stopping([], self.eos)

    @property
    def reads_text(self) -> bool:
        """Whether a criterion must be shown the text; otherwise `is_last` decides."""
        return bool(self.known or self.custom)

    def is_last(self, text: Text, drafted: int, token: int) -> bool:
        """Whether `token`, after `text` and `drafted` more tokens, ends the row by itself or by the row's length."""
        return token in self.eos or self.remaining(text) - drafted <= 1

    def remaining(self, text: Text) -> int:
        """Tokens that may still follow `text`, at least one; a large number if there is no limit."""
        return (1 << 30) if self.max_length is None else max(self.max_length - len(text) - text.padding, 1)

    def ends(
        self, row: int, text: Text, path: Sequence[int], token: int, scores: Callable[[], list[Tensor]] | None = None
    ) -> bool:
        """Whether `token`, after `text` and the drafted `path`, is the row's last.

        Args:
            scores: computes the (vocab,) processed scores that each token of `path` and `token` were chosen from.
        """
        ended = self.is_last(text, len(path), token)
        if not self.reads_text:
            return ended
        ids, seen = text.padded([*path, token]), None
        if self.kept is not None and scores is not None:
            seen = tuple(step[None] for step in [*self.kept[row], *scores()])
        for criterion in (*self.known, *self.custom):
            answer = criterion(ids, seen)  # type: ignore[arg-type]
            ended |= bool(answer.any() if isinstance(answer, Tensor) else answer)
        return ended

    def ended(self, ids: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        """(rows,) bool on the host: which rows of (rows, length) `ids` have ended, as in plain `generate`."""
        return self.criteria(ids, scores).bool().cpu()  # type: ignore[arg-type]
