"""One of every method in the folders, found by walking them: what the contract tests hold to the laws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import Tensor

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
from csdraft.schedules.fixed import Fixed
from csdraft.tables.adjacency import AdjacencyTable
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.successors import SuccessorTable
from tests import tiny

NEW, SEEDS = 16, [11, 5, 8]
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLED = {"do_sample": True, "max_new_tokens": NEW, "temperature": 0.8, "top_k": 30}

Wrap = Callable[[Drafter], Drafter]


def unwrapped(drafter: Drafter) -> Drafter:
    return drafter


def noise(length: int) -> list[int]:
    """A document that random models follow now and then."""
    return random.Random(0).choices(range(tiny.VOCAB), k=length)


@cache
def target_texts() -> list[list[int]]:
    """What the target writes after `prompts`, greedily, with mistakes: documents from which much of it can be copied.

    Two of each text, whose mistakes differ, so that what follows a token there may branch.
    """
    inputs, rng, documents = prompts(3), random.Random(0), []
    for text in tiny.continuations(tiny.tiny("llama").generate(**inputs, **GREEDY), inputs) * 2:
        documents.append([rng.randrange(3, tiny.VOCAB) if rng.random() < 0.25 else token for token in text])
    return documents


@cache
def corpus() -> CorpusIndex:
    """One in which most pairs of tokens occur, and the target's texts."""
    return CorpusIndex.build([noise(20_000), *target_texts()])


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
    "reference": lambda family, wrap: Reference([noise(300), *target_texts()], depth=4),
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


def refuses(rule: str, type: str) -> bool:
    """Whether a verifier must refuse a drafter: it verifies only chains, and the drafts may branch."""
    return verifier(rule).chains_only and branches(type)


def verifier(type: str) -> Verifier:
    return spec.find("verifiers", type)()


def branching(type: str, family: str = "llama", scale: float = 0.1) -> ModelDrafter:
    """A model drafter with a tree of the folder."""
    return ModelDrafter(tiny.drafter_of(family, scale=scale), depth=3, tree=spec.find("trees", type)())


def schedule(type: str) -> Schedule:
    return spec.find("schedules", type)()


LOSSLESS = [type for type in VERIFIERS if verifier(type).lossless]


def prompts(rows: int) -> dict[str, Tensor]:
    """A ragged batch of texts that repeat themselves, so that also what copies drafts from the first round on."""
    inputs = tiny.ragged_batch((20, 9, 14)[:rows])
    for row, kept in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        row[kept] = row[kept][: (int(kept.sum()) + 1) // 2].repeat(2)[: int(kept.sum())]
    return inputs


@cache
def plain(rows: int) -> list[list[int]]:
    """What plain `generate` writes greedily after `prompts`."""
    return tiny.tiny("llama").generate(**prompts(rows), **GREEDY).tolist()


def decode(assistant: Drafter | None, inputs: dict, **options: Any) -> Any:
    """The output of a call and its report. Something was drafted, or the test fails: it would show nothing."""
    how = {"schedule": Fixed(), "strict": True, "return_dict_in_generate": True} | options
    output = tiny.tiny("llama").generate(**inputs, assistant=assistant, **how)
    assert output.report.target.drafted.total() > 0, "nothing was drafted, so this shows nothing"
    return output


class Forgetting:
    """Drops the cache of some sessions before a drafter proposes, and counts the tokens that were lost.

    Args:
        chance: of each session, each time.
    """

    def __init__(self, chance: float = 0.5) -> None:
        self.random, self.chance, self.lost = random.Random(1), chance, 0

    def __call__(self, contexts: Sequence[Context]) -> None:
        for session in contexts[0].call.sessions:
            if self.random.random() < self.chance:
                self.lost += session.kept
                session.forget()
                assert session.kept == 0


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
    kept = "the nodes that it was given come first, as they were"
    assert draft.tokens[:old] == context.draft.tokens, kept
    assert draft.parents[:old] == context.draft.parents, kept
    assert draft.levels[:old] == context.draft.levels, kept
    assert max(draft.depths, default=-1) < draft.depth(context.tip) + budget.room, "more than its room"
    assert all(node >= old or parent == context.draft.parents[node] for node, parent in enumerate(draft.parents))
    assert all(0 <= token < call.vocab for token in draft.tokens)
    assert all(0 < level < len(call.level_owners) for level in draft.levels), "the target's level, or no level"
    assert all(math.isnan(sure) or 0 < sure < 1 for sure in draft.confidence), "law 3: one-hot confidence"
    independent = not (call.sampler.coupled or call.sampler.greedy)
    assert draft.probs is None or (independent and len(draft.probs.rows) == len(draft))
