"""A drafter that may fail: what it hands up is checked, and an exception costs speed, never text."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round

__all__ = ["Guarded"]


class Guarded(Drafter):
    """Runs a drafter, times it, and goes on without it once it has failed.

    Args:
        drafter: what to run; None never drafts, which is plain decoding.
        vocab: the target's number of tokens.
        strict: raise instead of going on.
    """

    def __init__(self, drafter: Drafter | None, vocab: int, strict: bool = False):
        self.drafter, self.vocab, self.strict = drafter, vocab, strict
        self.failure: str | None = None
        self.seconds = 0.0

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        if self.drafter is None or self.failure or not any(b.depth > 0 for b in budgets):
            return [c.draft for c in contexts]
        started = time.perf_counter()
        try:
            drafts = self.drafter.propose(contexts, budgets)
            self._check(drafts, budgets, len(contexts[0].call.level_owners))
        except Exception as error:  # whatever a drafter does wrong must not cost the user the text
            if self.strict:
                raise
            self._give_up(error)
            drafts = [c.draft for c in contexts]
        self.seconds += time.perf_counter() - started
        return drafts

    def observe(self, rounds: Sequence[Round]) -> None:
        if self.drafter is None or self.failure:
            return
        try:
            self.drafter.observe(rounds)
        except Exception as error:  # as above
            if self.strict:
                raise
            self._give_up(error)

    def _check(self, drafts: Sequence[Draft], budgets: Sequence[Budget], levels: int) -> None:
        for draft, budget in zip(drafts, budgets, strict=True):
            if any(not 0 <= token < self.vocab for token in draft.tokens):
                bad = next(token for token in draft.tokens if not 0 <= token < self.vocab)
                raise ValueError(f"token {bad} was drafted, but the target's vocabulary has {self.vocab} tokens")
            if any(not 0 <= level < levels for level in draft.levels):
                raise ValueError(f"levels {sorted(set(draft.levels))} are unknown; take numbers from Call.level")
            if len(draft) and max(draft.depths) >= budget.room:
                raise ValueError(f"a draft is {max(draft.depths) + 1} tokens deep, but its room was {budget.room}")

    def _give_up(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the drafter {type(self.drafter).__name__} failed and is left out for the rest of this call "
            f"({self.failure}); the text is not affected. Pass strict=True to raise instead.",
            RuntimeWarning,
            stacklevel=4,
        )
