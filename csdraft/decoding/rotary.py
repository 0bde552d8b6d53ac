"""Models whose rotary factors change at a text length (longrope): which factors read which position.

Such a model looks at the largest position of a forward and takes one set of factors for all of its positions. Plain
`generate` reads the prompt in one forward and every later token in one of its own, all rows of a batch together, so
the longest row decides. Decoding with drafts does the same: no forward mixes the two sets.
"""

from __future__ import annotations

from collections.abc import Sequence

from csdraft.decoding.inputs import Plan
from csdraft.decoding.text import Text
from csdraft.decoding.traits import Switch

__all__ = ["RotaryFactors"]


class RotaryFactors:
    """Whether plain `generate` reads a token of this batch with the factors for long texts.

    Args:
        switch: of the model.
        texts: one a row.
    """

    def __init__(self, switch: Switch, texts: Sequence[Text]):
        self.switch = switch
        self.padded = min(text.padding for text in texts)  # of the longest row
        self._behind = [text.padding - self.padded for text in texts]  # tokens that a row is shorter by
        self._prompt = max(text.prompt_length + text.padding for text in texts) - self.padded  # of the longest row

    def long(self, row: int, position: int, length: int) -> bool:
        """Of the token at `position`, when the row's text has `length` tokens."""
        together = self._prompt  # read in one forward, at least
        switch = self.switch.length
        if self.switch.rereads and length + self._behind[row] + self.padded > switch:
            together = max(together, switch + 1 - self.padded)
        return max(position + self._behind[row] + 1, together) > switch

    def part(self, plans: dict[int, Plan], long: bool) -> dict[int, Plan]:
        """Of what each row feeds, by row, what is read with the factors for long texts, or with the others."""
        found = {}
        for row, feed in plans.items():
            queries = [i for i, at in enumerate(feed.positions) if self.long(row, at, feed.length) is long]
            if queries:
                found[row] = feed if len(queries) == len(feed.tokens) else feed.only(queries)
        return found

    def kept_are_long(self, row: int, length: int, kept: int) -> bool:
        """Whether a cache of the user's, of `kept` tokens and padding, counts as read with the factors for long texts.

        Plain `generate` never reads it again, unless the model does so and it was short.
        """
        return kept > self.switch.length if self.switch.rereads else self.long(row, 0, length)

    def room(self, row: int, length: int) -> int:
        """How many drafted tokens may follow a text of `length` tokens, so that one forward can read both."""
        if self.long(row, length - 1, length):
            return 1 << 30
        return self.switch.length - length - self._behind[row]
