"""What a schedule can tell a vertical cascade: how sure a draft must stay. Distributions are tested elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

import csdraft
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.drafters.model import ModelDrafter
from csdraft.drafters.vertical import Vertical
from csdraft.schedules.confidence import Confidence
from csdraft.trees.best_first import BestFirst
from csdraft.trees.pairs import Pairs
from csdraft.trees.recursive import Recursive
from csdraft.trees.sampled import Sampled
from tests import tiny

WANTED = {"max_new_tokens": 24, "do_sample": False}
THRESHOLD = 0.15
"""The tiny models are sure of a tenth to a half."""


@dataclass(frozen=True, eq=False)
class Heard(Drafter):
    """Passes on, and writes down what `stop` was asked a draft, and how long the draft became."""

    inner: Drafter
    asked: list[list[float]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def models(self) -> list[object]:
        return self.inner.models()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        (budget,), heard = budgets, []
        stop = budget.stop and (lambda sure, entropy: heard.append(sure) or budget.stop(sure, entropy))
        (draft,) = self.inner.propose(contexts, [replace(budget, stop=stop)])
        self.asked.append(heard)
        self.lengths.append(len(draft))
        return [draft]


def heard(threshold: float, **options) -> tuple[Heard, csdraft.Report]:
    """A text, written with a vertical cascade that drafts up to 8 tokens, a few a round."""
    inner = csdraft.ModelDrafter(tiny.drafter_of("llama", scale=0.2), depth=2)
    watched = Heard(csdraft.Vertical(tiny.drafter_of("llama"), inner, lenience=options.pop("lenience", 1.0)))
    how = {"schedule": Confidence(threshold, depth=8), "strict": True, "return_dict_in_generate": True}
    output = tiny.tiny("llama").generate(**tiny.prompt(), **WANTED | options, assistant=watched, **how)
    if not options:
        assert torch.equal(output.sequences, tiny.tiny("llama").generate(**tiny.prompt(), **WANTED))
    return watched, output.report


@pytest.mark.parametrize("lenience", [1.0, 3.0])
@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_ends_with_the_round_that_became_unsure(do_sample: bool, verifier: str, lenience: float) -> None:
    watched, _ = heard(THRESHOLD, do_sample=do_sample, verifier=verifier, lenience=lenience)
    stopped = [sure for sure in watched.asked if sure and sure[-1] < THRESHOLD]
    assert stopped
    for sure, length in zip(watched.asked, watched.lengths, strict=True):
        assert all(0 < s <= 1 for s in sure)
        assert all(s >= THRESHOLD for s in sure[:-1]), "asked on after an unsure token"
        assert len(sure) <= length <= len(sure) + 2, "at most the rest of the last round stands behind it"


def test_thresholds_shorten_drafts() -> None:
    never, sometimes, always = (heard(threshold)[0].lengths for threshold in (0.0, THRESHOLD, 1.0))
    assert sum(never) / len(never) > sum(sometimes) / len(sometimes) > sum(always) / len(always)
    assert max(always) <= 3, "the first round is the last"


def test_nobody_computes_confidence_that_nobody_reads() -> None:
    watched = Heard(csdraft.Vertical(tiny.drafter_of("llama"), csdraft.MaxGram()))
    tiny.tiny("llama").generate(**tiny.prompt(), **WANTED, assistant=watched, schedule="fixed", strict=True)
    assert not any(watched.asked)


@pytest.mark.parametrize("tree", [Sampled((2, 2)), Recursive((2, 2)), Pairs((2, 2)), BestFirst(2, 4)], ids=repr)
def test_a_drawn_tree_is_reviewed_by_its_own_rule(tree):
    """Under independent draws what is handed up is a chain with the reviewer's distributions."""
    inner = ModelDrafter(tiny.drafter_of("llama", scale=0.2), depth=2, tree=tree)
    assistant = Vertical(tiny.drafter_of("llama"), inner, depth=4)
    how = {"do_sample": True, "max_new_tokens": 16, "verifier": "rejection", "schedule": "fixed", "strict": True}
    output = tiny.tiny("llama").generate(
        **tiny.inputs_of("llama", 3), **how, assistant=assistant, return_dict_in_generate=True
    )
    assert output.report.target.accepted.total() > 0
