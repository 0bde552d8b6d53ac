"""One row's text: append-only, owned by the loop, shared by every level and never copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Text"]


class Text:
    """The committed token ids of one row, prompt included, padding excluded.

    Args:
        prompt: (length,) the row as `generate` received it, padding included.
        mask: (length,) 1 where the token counts; None if all do.
    """

    def __init__(self, prompt: Tensor, mask: Tensor | None = None):
        ids: list[int] = prompt.tolist()
        self.padding = 0 if mask is None else len(ids) - int(mask.sum())
        self.tokens: list[int] = ids if not self.padding else [t for t, m in zip(ids, mask.tolist(), strict=True) if m]  # type: ignore[union-attr]
        self.prompt_length = len(self.tokens)
        self._padded = prompt.new_empty(1, 2 * len(ids) + 64)
        self._padded[0, : len(ids)] = prompt
        self._written = len(ids)

    def __len__(self) -> int:
        """Number of tokens, padding not counted: also the absolute position of the next token."""
        return len(self.tokens)

    @property
    def new_tokens(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    def append(self, tokens: Sequence[int]) -> None:
        """Commits `tokens`; only the loop calls this."""
        self.tokens.extend(tokens)

    def tail(self, n: int) -> list[int]:
        """The last `n` tokens, or fewer if the text is shorter."""
        return self.tokens[-n:] if n else []

    def padded(self, path: Sequence[int] = ()) -> Tensor:
        """(1, length) the row with the user's padding, followed by the uncommitted tokens of `path`.

        A view, valid until the next call; this is what processors and stopping criteria see.
        """
        committed = len(self.tokens) + self.padding
        length = committed + len(path)
        if length > self._padded.shape[1]:
            self._padded = torch.cat([self._padded, self._padded.new_empty(1, length)], 1)
        fresh = self.tokens[self._written - self.padding :] if self._written < committed else []
        tail = [*fresh, *path]
        if tail:
            place = self._padded[0, length - len(tail) : length]
            new = torch.tensor(tail, dtype=place.dtype, device="cpu")
            place.copy_(new, non_blocking=True)  # the host need not wait for a GPU
        self._written = committed
        return self._padded[:, :length]
