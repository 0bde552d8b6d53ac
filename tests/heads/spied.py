"""A model drafter that looks at what it drafts: what the tests of heads decode with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from csdraft import ModelDrafter
from csdraft.decoding import feature_session
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.trees.best_first import BestFirst
from tests.heads.learned import PROMPTS, naive, target
from tests.tiny import ragged_batch

FIXED = {"schedule": {"type": "fixed", "depth": 4}, "strict": True, "pad_token_id": 0}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
LONG = GREEDY | {"max_new_tokens": 20}
"""Where what was drafted is counted."""
DRAWS = pytest.mark.parametrize("count", [500, pytest.param(1500, marks=pytest.mark.slow)])
"""Texts that are drawn to see their distribution; many show less of a fault."""
FORMS = pytest.mark.parametrize(
    ("tree", "rows"),
    [
        pytest.param(BestFirst(3, 9), 3, id="tree-3"),
        pytest.param(None, 1, id="chain-1", marks=pytest.mark.slow),
        pytest.param(None, 3, id="chain-3", marks=pytest.mark.slow),
        pytest.param(BestFirst(3, 9), 1, id="tree-1", marks=pytest.mark.slow),
    ],
)
"""What a head drafts, and for how many rows."""
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "all"])
"""Whether all cases of `each_way` are run."""
SAMPLED = {"max_new_tokens": 12, "do_sample": True, "row_seeds": [5, 6, 7], "top_k": 0, "temperature": 0.9}


@dataclass(frozen=True, eq=False)
class Spied(ModelDrafter):
    """Compares each drafted token's confidence with that of a naive forward; drops caches at random if asked."""

    forget: bool = False
    errors: list[float] = field(default_factory=list)
    drafts: list[Any] = field(default_factory=list)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call, chance = contexts[0].call, random.Random(len(contexts[0].text))
        for model in (call.target, self.network):
            if self.forget and chance.random() < 0.5:
                call.session(model).forget()
        made = super().propose(contexts, [replace(budget, confidence=True) for budget in budgets])
        session = call.session(self.network)
        if isinstance(session, feature_session.FeatureSession):  # an entry is read once, unless given up
            assert session.use.fed == session.kept + session.use.rolled_back
        for context, draft in zip(contexts, made, strict=True):
            self.drafts.append((context.row, draft.tokens, draft.parents))
            for node in range(len(context.draft), len(draft)):
                parent = draft.parents[node]
                path = [draft.tokens[i] for i in ([] if parent == ROOT else draft.path(parent))]
                wanted = float(self.right(context.text.tokens, path)[draft.tokens[node]])
                self.errors.append(abs(wanted - draft.confidence[node]))
        return made

    def right(self, text: list[int], path: list[int]) -> Tensor:
        """(vocab,) probabilities after a text and some drafted tokens, by `naive`, once for each place."""
        after_text = _KNOWN.setdefault(self.network, {}).setdefault(tuple(text), {})
        return naive(self.network, text, path, after_text)[0].softmax(-1)


_KNOWN: WeakKeyDictionary[Any, dict[Any, dict[Any, Any]]] = WeakKeyDictionary()
"""What `naive` returned for heads, which must not change: by text and by path."""


def written(assistant: Any, rows: int = 3, **options: Any) -> Tensor:
    return target().generate(**ragged_batch(PROMPTS[:rows]), assistant=assistant, **FIXED, **options)


def each_way(drafters: Sequence[Any], rows: int, every: bool) -> list[tuple[Any, bool]]:
    """(drafter, whether its text is drawn): each drafter both ways, or one way for one row and the other for three."""
    ways = [(number, drafter, drawn) for number, drafter in enumerate(drafters) for drawn in (False, True)]
    return [(drafter, drawn) for number, drafter, drawn in ways if every or (number + rows // 2 + drawn) % 2 == 0]


def wrong_parent(plan: Any) -> list[int]:
    return [max(slot - 1, 0) for slot in right_parents(plan)]


def wrong_target(self: Any, row: int, start: int, stop: int) -> Tensor:
    found = right_features(self, row, max(start - 1, 0), stop)
    return found[-(stop - start) :] if start == 0 else found[: stop - start]


right_parents, right_features = feature_session._parents, feature_session.FeatureSession._of_target


def drawn_as_the_target(drafter: Any, rule: str, count: int = 1500) -> None:
    """Tokens 2 and 3 of so many texts against the exact probabilities; token 1 comes without a draft."""
    options = {"do_sample": True, "top_k": 3, "max_new_tokens": 3, "eos_token_id": None, "row_seeds": range(count)}
    ids = ragged_batch((11,))["input_ids"].expand(count, -1)
    out = target().generate(ids, assistant=drafter, verifier=rule, **FIXED, **options)
    found, expected = {}, exact(ids[:1])
    for row in out[:, -3:].tolist():
        found[tuple(row)] = found.get(tuple(row), 0) + 1
    assert found.keys() <= expected.keys()
    likely = {text: p * count for text, p in expected.items() if p * count >= 5}
    chi2 = sum((found.get(text, 0) - wanted) ** 2 / wanted for text, wanted in likely.items())
    assert chi2 < len(likely) + 4 * (2 * len(likely)) ** 0.5


@torch.no_grad()
def exact(ids: Tensor) -> dict[tuple[int, ...], float]:
    """The probabilities of all three tokens that may follow a text, with top_k = 3."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for path, p in known.items():
            logits = target()(torch.cat([ids, torch.tensor([path], dtype=torch.long).view(1, -1)], 1)).logits[0, -1]
            top = logits.topk(3)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[*path, token] = p * share
        known = longer
    return known
