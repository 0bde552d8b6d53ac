"""Where a text ends: `generate`'s stopping criteria asked token by token, so that none is passed inside an accepted block."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from csdraft.decoding.text import Text

__all__ = ["Stopping"]


class Stopping:
    """Asks every stopping criterion about every emitted token; the two common ones without building a tensor.

    Args:
        criteria: what `generate` prepared.
        rows: batch size; criteria that may keep state get one copy a row.
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
        self.others = [others] + [copy.deepcopy(others) for _ in range(rows - 1)] if others else []

    def for_drafters(self) -> Stopping:
        """End-of-text tokens only: a drafter need not know more to stop in time."""
        inner = Stopping([], 1)
        inner.eos = self.eos
        return inner

    def remaining(self, text: Text) -> int:
        """Tokens that may still follow `text`; a large number if there is no limit."""
        return (1 << 30) if self.max_length is None else self.max_length - len(text) - text.padding

    def ends(self, row: int, text: Text, path: Sequence[int], token: int) -> bool:
        """Whether `token` after `text` and the uncommitted `path` is the row's last."""
        ended = token in self.eos or self.remaining(text) - len(path) <= 1
        if self.others:
            ids = text.padded([*path, token])
            for criterion in self.others[row]:
                ended |= bool(criterion(ids, None)[0])  # type: ignore[arg-type]
        return ended
