"""A drafter that may fail: its drafts are checked, and an exception costs speed, never text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import TypeVar

from csdraft.decoding.awaited import Awaited
from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import NOTHING, Budget, Context, Drafter, Round, Schedule, Verifier
from csdraft.decoding.scores import NAN
from csdraft.decoding.text import Text

__all__ = ["SafeDrafter"]

T = TypeVar("T")
TAIL = 64
"""How many tokens at the end of a text are compared with its copy."""


class SafeDrafter(Drafter):
    """Runs a drafter, and continues without it once it has failed.

    Every use of the drafter in a call goes through here, including that by its schedule.

    Args:
        drafter: what to run; None never drafts, which is plain decoding.
        verifier: the rule that verifies its drafts at the target.
        strict: raise instead of continuing.
    """

    def __init__(self, drafter: Drafter | None, verifier: Verifier, strict: bool = False):
        self.drafter, self.verifier, self.strict = drafter, verifier, strict
        self.failure: str | None = None
        self._texts: list[tuple[Text, list[int]]] = []  # with a copy of each text's tokens

    def attempt(self, action: Callable[[Drafter], T], otherwise: T) -> T:
        """The result of `action(drafter)`; `otherwise` if that fails, or if the drafter has failed before."""
        if self.drafter is None or self.failure:
            return otherwise
        for text, kept in self._texts:
            kept += text.tokens[len(kept) :]
        try:
            found = action(self.drafter)
            self._check_texts()
        except Exception as error:  # no mistake of a drafter may cost the user the text
            for text, kept in self._texts:
                text.tokens[:] = kept
            self._give_up(error)
            return otherwise
        return found

    # Before the first round.

    def models(self) -> list[object]:
        return self.attempt(lambda drafter: drafter.models(), [])

    def taps(self) -> frozenset[int]:
        return self.attempt(lambda drafter: drafter.taps(), frozenset())

    def check(self, call: Call) -> None:
        """Raises ValueError for a mistake of the user's; any other exception counts as a failure of the drafter."""
        try:
            if self.drafter is not None and not self.failure:
                self._texts = [(text, []) for text in call.texts]
                self.drafter.check(call)
                if self.verifier.chains_only and self.drafter.width(self.drafter.depth) > self.drafter.depth:
                    raise ValueError(
                        f"{type(self.drafter).__name__} may draft trees, but {type(self.verifier).__name__} verifies "
                        "only chains; draft chains, or use another verifier"
                    )
        except ValueError:
            raise
        except Exception as error:  # as above
            self._give_up(error)

    def start(self, schedule: Schedule, call: Call) -> Schedule:
        """The schedule's working copy for this call."""
        return self.attempt(lambda drafter: schedule.start(call, drafter), schedule)

    # In every round.

    def budgets(self, schedule: Schedule, contexts: Sequence[Context], rooms: Sequence[int]) -> list[Budget]:
        """The schedule's budgets; empty ones once the drafter has failed, even if it fails while the schedule runs."""

        def allowed(drafter: Drafter) -> list[Budget]:
            budgets = schedule.budgets(contexts, rooms, drafter)
            return [replace(b, confidence=True) for b in budgets] if self.verifier.reads_confidence else budgets

        return self.attempt(allowed, [NOTHING] * len(rooms))

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        nothing = [context.draft for context in contexts]
        if not any(budget.depth > 0 for budget in budgets):
            return nothing

        def checked(drafter: Drafter) -> list[Draft]:
            drafts = drafter.propose(contexts, budgets)
            for draft, budget in zip(drafts, budgets, strict=True):
                if flaw := self._flaw(draft, budget.room, contexts[0].call) or self.verifier.refusal(draft):
                    raise ValueError(flaw)
            return drafts

        return self.attempt(checked, nothing)

    def observe(self, rounds: Sequence[Round]) -> None:
        def checked(drafter: Drafter) -> None:
            for finished in rounds:
                tokens = finished.draft.tokens
                if isinstance(tokens, Awaited) and tokens.have_nan:
                    raise ValueError(NAN)
            drafter.observe(rounds)

        self.attempt(checked, None)

    def learn(self, schedule: Schedule, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        """Gives the schedule the results of a round."""
        self.attempt(lambda drafter: schedule.observe(rounds, draft_seconds, score_seconds), None)

    # Checks of drafts.

    def _check_texts(self) -> None:
        """Raises ValueError if the drafter has written to a text's list of tokens, which it should copy first."""
        for text, kept in self._texts:
            if len(text.tokens) != len(kept) or text.tokens[-TAIL:] != kept[-TAIL:]:
                raise ValueError("it changed the text's own list of tokens; let it copy the list first")

    def _flaw(self, draft: Draft, room: int, call: Call) -> str | None:
        """Why a draft would raise later in the round, where the text would be lost; None if it would not."""
        size, levels = len(draft.tokens), len(call.level_owners)
        columns = (draft.parents, draft.levels, draft.confidence)
        awaited = isinstance(draft.tokens, Awaited)  # choices of a model, made of the target's vocabulary
        all_tuples = all(isinstance(column, tuple) and len(column) == size for column in columns)
        if not (all_tuples and (awaited or isinstance(draft.tokens, tuple))):
            return f"a draft of {size} tokens must have as many parents, levels and confidences, all of them tuples"
        if not awaited and (bad := _outside(draft.tokens, call.vocab)) is not None:
            return f"token {bad!r} was drafted, but the target's vocabulary has {call.vocab} tokens"
        if any(not isinstance(parent, int) or not ROOT <= parent < node for node, parent in enumerate(draft.parents)):
            return f"parents {draft.parents} are out of order: a node's parent comes before it"
        if _outside(draft.levels, levels) is not None:
            return f"levels {sorted(set(draft.levels))} are unknown; take numbers from Call.level"
        if size and max(draft.depths) >= room:
            return f"a draft is {max(draft.depths) + 1} tokens deep, but its room was {room}"
        if self.verifier.reads_confidence and (odd := [c for c in draft.confidence if not _is_confidence(c)]):
            return f"confidence {odd[0]!r} of a drafted token must be a probability, or nan where there is none"
        if draft.probs is not None and len(draft.probs.rows) != size:
            return f"a draft of {size} tokens has distributions for {len(draft.probs.rows)}"
        read = draft.probs is not None and self.verifier.draws == "independent"
        return draft.probs.flaw(call.vocab) if read else None  # type: ignore[union-attr]

    def _give_up(self, error: Exception) -> None:
        """Leaves the drafter out for the rest of the call, or raises when strict."""
        if self.strict:
            raise error
        self.failure = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the drafter {type(self.drafter).__name__} failed and is left out for the rest of this call "
            f"({self.failure}); the text is not affected. Pass strict=True to raise instead.",
            RuntimeWarning,
            stacklevel=5,
        )


def _outside(numbers: Sequence[int], end: int) -> object:
    """The first that is not an integer from 0 to `end` - 1; None if all are."""
    return next((n for n in numbers if not isinstance(n, int) or not 0 <= n < end), None)


def _is_confidence(value: object) -> bool:
    return isinstance(value, Real) and (math.isnan(value) or 0 <= value <= 1 + ROUNDING)  # type: ignore[operator]


ROUNDING = 1e-3
"""How far the softmax of a model in half precision may exceed 1."""
