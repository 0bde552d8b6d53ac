"""Turns token ids into text, token by token, and never returns half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer"]

CONTEXT = 8
"""The most tokens before the text that are decoded with it."""


class Detokenizer:
    """Decodes a growing text. A character that consists of several tokens is returned with the last of them.

    Args:
        tokenizer: the target's.
        after: tokens before the text. Some tokenizers write a word's first space only if something precedes it.
        special: whether to show special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, after: Sequence[int] = (), special: bool = False):
        self.tokenizer, self.special = tokenizer, special
        self._ids = list(after)[-CONTEXT:]  # the last tokens, enough to decode what follows
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """The characters that `token` adds to the text."""
        self._ids.append(token)
        gained = self._gained()
        if not gained or gained.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return gained

    def flush(self) -> str:
        """What is left at the end of the text: a character that was not completed."""
        gained = self._gained()
        self._shown = len(self._ids)
        return gained

    def _gained(self) -> str:
        before, whole = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a batch
        return text
