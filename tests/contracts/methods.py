"""One of every method in the folders, found by walking them: what the contract tests hold to the laws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest

from csdraft import Drafter, Horizontal, MaxGram, ModelDrafter, Vertical, spec
from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Schedule, Verifier
from csdraft.decoding.session import Session
from csdraft.drafters.auto import Auto
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.merged import Merged
from csdraft.drafters.n_grammys import NGrammys
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.drafters.reference import Reference
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.drafters.translated import Translated
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.successors import SuccessorTable
from tests import tiny

Wrap = Callable[[Drafter], Drafter]


def unwrapped(drafter: Drafter) -> Drafter:
    return drafter


def noise(length: int) -> list[int]:
    """A document that random models follow now and then."""
    return random.Random(0).choices(range(tiny.VOCAB), k=length)


@cache
def corpus() -> CorpusIndex:
    """One in which most pairs of tokens occur."""
    return CorpusIndex.build([noise(20_000)])


def adjacency() -> AdjacencyTable:
    """One that knows eight random successors of every token."""
    table, size = AdjacencyTable(tiny.VOCAB), (tiny.VOCAB, 8)
    table.update(np.arange(tiny.VOCAB), np.random.default_rng(0).integers(3, tiny.VOCAB, size))
    return table


def successors() -> SuccessorTable:
    """Four random continuations of every token."""
    return SuccessorTable(np.random.default_rng(0).integers(3, tiny.VOCAB, (tiny.VOCAB, 4, 2)))


MAKE: dict[str, Callable[[str, Wrap], Drafter]] = {
    "model": lambda family, wrap: ModelDrafter(tiny.drafter_of(family), depth=4),
    "vertical": lambda family, wrap: Vertical(tiny.drafter_of(family), wrap(MaxGram(depth=3)), depth=6),
    "horizontal": lambda family, wrap: Horizontal(
        (wrap(Vertical(tiny.drafter_of(family), wrap(MaxGram(depth=3)))), wrap(MaxGram())), (2, 4)
    ),
    "datastore": lambda family, wrap: Datastore(corpus(), nodes=12),
    "auto": lambda family, wrap: Auto(adjacency=adjacency(), remember=False),
    "token_recycling": lambda family, wrap: TokenRecycling(table=adjacency(), remember=False),
    "n_grammys": lambda family, wrap: NGrammys(depth=4, rows=4, table=successors()),
    "ouroboros": lambda family, wrap: Ouroboros(wrap(ModelDrafter(tiny.drafter_of(family), depth=3)), remember=False),
    "translated": lambda family, wrap: Translated(
        ModelDrafter(tiny.drafter_of(family), depth=4), tiny.tokenizer(), tiny.tokenizer()
    ),
    "merged": lambda family, wrap: Merged(
        (wrap(ModelDrafter(tiny.drafter_of(family), depth=4)), wrap(MaxGram(depth=3)))
    ),
    "reference": lambda family, wrap: Reference([noise(300)], depth=4),
}
"""How to make the drafters that do not come with their defaults: with models of a family, each drafter inside
another one wrapped."""

DRAFTERS = spec.types("drafters")
SCHEDULES = spec.types("schedules")
TREES = spec.types("trees")
VERIFIERS = spec.types("verifiers")


def drafter(type: str, family: str = "llama", wrap: Wrap = unwrapped) -> Drafter:
    """A drafter of the folder; the test fails if nobody has said how to make one."""
    if type in MAKE:
        return wrap(MAKE[type](family, wrap))
    try:
        return wrap(spec.find("drafters", type)())
    except TypeError as error:
        pytest.fail(
            f"csdraft/drafters/{type}.py cannot be made with its defaults ({error}); "
            "give it defaults, or say how to make one in MAKE of tests/contracts/methods.py"
        )


def branches(type: str) -> bool:
    """Whether a drafter's drafts may have more tokens than they are deep, as it says itself."""
    made = drafter(type)
    return any(made.width(depth) > depth for depth in range(1, made.depth + 1))


def verifier(type: str) -> Verifier:
    return spec.find("verifiers", type)()


def branching(type: str, family: str = "llama", scale: float = 0.1) -> ModelDrafter:
    """A model drafter with a tree of the folder."""
    return ModelDrafter(tiny.drafter_of(family, scale=scale), depth=3, tree=spec.find("trees", type)())


def schedule(type: str) -> Schedule:
    return spec.find("schedules", type)()


LOSSLESS = [type for type in VERIFIERS if verifier(type).lossless]


@dataclass(frozen=True, eq=False)
class Watched(Drafter):
    """Passes everything on; checks what a proposal owes, and remembers the call's sessions.

    Args:
        inner: the drafter that is watched.
        before: called with the contexts of each proposal first.
    """

    inner: Drafter
    before: Callable[[Sequence[Context]], None] | None = None
    sessions: list[Session] = field(default_factory=list)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.inner.depth

    def models(self) -> list[object]:
        return self.inner.models()

    def evidence(self, context: Context) -> int:
        return self.inner.evidence(context)

    def check(self, call: Call) -> None:
        self.inner.check(call)

    def observe(self, rounds) -> None:
        self.inner.observe(rounds)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        if self.before is not None:
            self.before(contexts)
        sure = [replace(budget, confidence=True) for budget in budgets]
        drafts = self.inner.propose(contexts, sure)
        self.sessions[:] = contexts[0].call.sessions
        for context, budget, draft in zip(contexts, budgets, drafts, strict=True):
            check_proposal(context, budget, draft)
        return drafts


def check_proposal(context: Context, budget: Budget, draft: Draft) -> None:
    """What any drafter owes: the nodes it was given first, no more than its room, and honest labels."""
    old, call = len(context.draft), context.call
    assert draft.tokens[:old] == context.draft.tokens
    assert draft.parents[:old] == context.draft.parents
    assert draft.levels[:old] == context.draft.levels
    assert max(draft.depths, default=-1) < draft.depth(context.tip) + budget.room
    assert all(node >= old or parent == context.draft.parents[node] for node, parent in enumerate(draft.parents))
    assert all(0 <= token < call.vocab for token in draft.tokens)
    assert all(0 < level < len(call.level_owners) for level in draft.levels)
    assert all(math.isnan(sure) or 0 < sure < 1 for sure in draft.confidence), "law 3: one-hot confidence"
    independent = not (call.sampler.coupled or call.sampler.greedy)
    assert draft.probs is None or (independent and len(draft.probs.rows) == len(draft))
