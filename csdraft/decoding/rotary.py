"""Models that change their rotary factors at a text length (longrope): which factors a position is read with.

Such a model looks at the largest position of a forward, and uses one set of factors for all its positions. Plain
`generate` reads the prompt in one forward and then one token a forward, all rows of a batch together, so the longest
row decides. Decoding with drafts does the same: no forward mixes the two sets.
"""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.inputs import Plan
from csdraft.decoding.text import Text
from csdraft.decoding.traits import Switch

__all__ = ["RotaryFactors"]


class RotaryFactors:
    """Says which tokens of a batch plain `generate` reads with the factors for long texts.

    Args:
        switch: the model's switch.
        texts: one for each row.
    """

    def __init__(self, switch: Switch, texts: Sequence[Text]):
        self.switch = switch
        self.padded = min(text.padding for text in texts)  # the longest row's padding
        self._behind = [text.padding - self.padded for text in texts]  # (rows,) how much shorter each row is
        self._prompt = max(text.prompt_length + text.padding for text in texts) - self.padded  # longest row's prompt

    def long(self, row: int, position: int, length: int) -> bool:
        """Whether the token at `position` is read with them, when the row's text has `length` tokens."""
        together = self._prompt  # tokens that are read in one forward, at least
        switch = self.switch.length
        if self.switch.rereads and length + self._behind[row] + self.padded > switch:
            together = max(together, switch + 1 - self.padded)
        return max(position + self._behind[row] + 1, together) > switch

    def part(self, plans: dict[int, Plan], long: bool) -> dict[int, Plan]:
        """By row, the part of each plan that is read with the factors for long texts, or with those for short ones."""
        found = {}
        for row, plan in plans.items():
            queries = [i for i, at in enumerate(plan.positions) if self.long(row, at, plan.length) is long]
            if queries:
                found[row] = plan if len(queries) == len(plan.tokens) else plan.only(queries)
        return found

    def kept_are_long(self, row: int, length: int, kept: int) -> bool:
        """Whether a user's cache of `kept` tokens and padding counts as read with the factors for long texts.

        Plain `generate` reads it again only if the model does that (`Switch.rereads`) and the cache was short.
        """
        return kept > self.switch.length if self.switch.rereads else self.long(row, 0, length)

    def room(self, row: int, length: int) -> int:
        """How many drafted tokens may follow a text of `length` tokens so that one forward can read both."""
        if self.long(row, length - 1, length):
            return 1 << 30
        return self.switch.length - length - self._behind[row]
