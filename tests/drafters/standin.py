"""A stand-in for `Call` with what learning-free drafters use, and the two things their tests do with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch

from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.decoding.text import Text


class StandInCall:
    """Rows, stop tokens, an encoder's inputs, per-call state and level numbers; no model."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        eos: Iterable[int] = (),
        sources: Sequence[Sequence[int]] | None = None,
        mask: Sequence[Sequence[int]] | None = None,
        vocab: int = 64,
    ):
        self.texts = [Text(torch.tensor(prompt, dtype=torch.long)) for prompt in prompts]
        self.rows, self.vocab = len(self.texts), vocab
        self.chooser = SimpleNamespace(stopping=SimpleNamespace(eos=frozenset(eos)))
        self.sources = None
        if sources is not None:
            self.sources = SimpleNamespace(
                input_ids=torch.tensor(sources), attention_mask=None if mask is None else torch.tensor(mask)
            )
        self.memos: dict = {}
        self.levels: dict = {"target": 0}

    def memo(self, owner, make: Callable):
        if owner not in self.memos:
            self.memos[owner] = make()
        return self.memos[owner]

    def level(self, owner) -> int:
        return self.levels.setdefault(owner, len(self.levels))

    def context(self, row: int = 0, path: Sequence[int] = ()) -> Context:
        context = Context(row, self.texts[row], self)  # type: ignore[arg-type]
        return context.after(Draft.chain(path)) if path else context


def proposed(
    drafter: Drafter, call: StandInCall, path: Sequence[int] = (), depth: int = 10, room: int = 1000, row: int = 0
) -> list[int]:
    """The new tokens of a proposal; what every proposal owes is checked on the way."""
    context = call.context(row, path)
    (draft,) = drafter.propose([context], [Budget(depth, room)])
    new = draft.tokens[len(path) :]
    assert draft.tokens[: len(path)] == tuple(path)
    assert draft.is_chain
    assert len(new) <= min(depth, room)
    assert draft.probs is None
    assert set(draft.levels[len(path) :]) <= {call.level(drafter)}
    assert all(c != c for c in draft.confidence[len(path) :])
    return list(new)


def microseconds(drafter: Drafter, call: StandInCall, tokens: Sequence[int], path: Sequence[int] = ()) -> float:
    """Median time of a proposal, taking in one committed token included."""
    context, budget, times = call.context(0, path), Budget(10, 10), []
    drafter.propose([context], [budget])
    for token in tokens:
        context.text.append([token])
        start = time.perf_counter()
        drafter.propose([context], [budget])
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
