"""Turns token ids into text, token by token, and never writes half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer"]

CONTEXT = 8


class Detokenizer:
    """Decodes a growing text. A token that ends inside a character adds nothing; the one that completes it, all of it.

    Args:
        tokenizer: the target's.
        after: tokens that stand before the text (a tokenizer may write a word's first space only after something).
        special: whether to show special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, after: Sequence[int] = (), special: bool = False):
        self.tokenizer, self.special = tokenizer, special
        self._ids = list(after)[-CONTEXT:]  # a window over the text: enough to decode its end
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """What the text gains by `token`."""
        self._ids.append(token)
        gained = self._gained()
        if not gained or gained.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return gained

    def flush(self) -> str:
        """The rest at the end: a character that was never completed."""
        gained = self._gained()
        self._shown = len(self._ids)
        return gained

    def _gained(self) -> str:
        before, whole = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one text, not a list of them
        return text
