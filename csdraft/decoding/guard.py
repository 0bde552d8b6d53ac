"""A drafter that may fail: what it hands up is checked, and an exception costs speed, never text."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

from csdraft.decoding.draft import ROOT, Draft, Law
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule, Verifier
from csdraft.decoding.report import Report

__all__ = ["Guarded"]


class Guarded(Drafter):
    """Runs a drafter, times it, and goes on without it once it has failed.

    Args:
        drafter: what to run; None never drafts, which is plain decoding.
        verifier: who judges its drafts at the target.
        vocab: the target's number of tokens.
        strict: raise instead of going on.
    """

    def __init__(self, drafter: Drafter | None, verifier: Verifier, vocab: int, strict: bool = False):
        self.drafter, self.verifier, self.vocab, self.strict = drafter, verifier, vocab, strict
        self.failure: str | None = None
        self.seconds = 0.0

    def budgets(self, schedule: Schedule, contexts: Sequence[Context], rooms: Sequence[int]) -> list[Budget]:
        """What the schedule allows; nothing once the drafter has failed, perhaps while the schedule asked it."""
        if self.drafter is None or self.failure:
            return [Budget(0, 0) for _ in rooms]
        try:
            budgets = schedule.budgets(contexts, rooms, self.drafter)
        except Exception as error:  # whatever a drafter does wrong must not cost the user the text
            self._give_up(error)
            return [Budget(0, 0) for _ in rooms]
        return [replace(b, confidence=True) for b in budgets] if self.verifier.reads_confidence else budgets

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        if self.drafter is None or self.failure or not any(b.depth > 0 for b in budgets):
            return [c.draft for c in contexts]
        started = time.perf_counter()
        try:
            drafts = self.drafter.propose(contexts, budgets)
            self._check(drafts, budgets, len(contexts[0].call.level_owners))
        except Exception as error:  # as above
            self._give_up(error)
            drafts = [c.draft for c in contexts]
        self.seconds += time.perf_counter() - started
        return drafts

    def observe(self, rounds: Sequence[Round]) -> None:
        if self.drafter is not None and not self.failure:
            try:
                self.drafter.observe(rounds)
            except Exception as error:  # as above
                self._give_up(error)

    def keep_report(self, report: Report) -> None:
        if self.drafter is not None:
            try:
                self.drafter.keep_report(report)
            except Exception as error:  # as above
                self._give_up(error)

    def _check(self, drafts: Sequence[Draft], budgets: Sequence[Budget], levels: int) -> None:
        """Raises ValueError for what would be an exception in the round, where it would cost the text."""
        for draft, budget in zip(drafts, budgets, strict=True):
            if flaw := self._flaw(draft, budget.room, levels) or self.verifier.refusal(draft):
                raise ValueError(flaw)

    def _flaw(self, draft: Draft, room: int, levels: int) -> str | None:
        size = len(draft.tokens)
        if {len(draft.parents), len(draft.levels), len(draft.confidence)} != {size}:
            return f"a draft of {size} tokens must have as many parents, levels and confidences"
        if any(not isinstance(t, int) or not 0 <= t < self.vocab for t in draft.tokens):
            bad = next(t for t in draft.tokens if not isinstance(t, int) or not 0 <= t < self.vocab)
            return f"token {bad!r} was drafted, but the target's vocabulary has {self.vocab} tokens"
        if any(not ROOT <= parent < node for node, parent in enumerate(draft.parents)):
            return f"parents {draft.parents} are out of order: a node's parent comes before it"
        if any(not 0 <= level < levels for level in draft.levels):
            return f"levels {sorted(set(draft.levels))} are unknown; take numbers from Call.level"
        if size and max(draft.depths) >= room:
            return f"a draft is {max(draft.depths) + 1} tokens deep, but its room was {room}"
        return None if draft.law is None else self._flaw_of_law(draft.law, size)

    def _flaw_of_law(self, law: Law, size: int) -> str | None:
        if len(law.rows) != size:
            return f"a draft of {size} tokens has laws for {len(law.rows)}"
        odd = [tuple(row.shape) for row in law.rows if row is not None and row.shape != (self.vocab,)]
        return f"a draft's law has shape {odd[0]}, the target's laws ({self.vocab},)" if odd else None

    def _give_up(self, error: Exception) -> None:
        """Leaves the drafter out for the rest of the call, or raises when strict."""
        if self.strict:
            raise error
        self.failure = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the drafter {type(self.drafter).__name__} failed and is left out for the rest of this call "
            f"({self.failure}); the text is not affected. Pass strict=True to raise instead.",
            RuntimeWarning,
            stacklevel=4,
        )
