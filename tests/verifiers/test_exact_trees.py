"""Law 1 for trees: whatever a tree drafts, a lossless verifier writes the target's distribution."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from csdraft import spec
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Tree
from csdraft.decoding.sampling import Sampler
from csdraft.drafters.merged import Merged
from csdraft.trees.stochastic_beam import StochasticBeam
from tests.verifiers.toy import Place, Tables, TableScores, exact_distribution, text_distribution, total_variation
from tests.verifiers.toy_trees import TREES, grown, proposing, small

LENGTH, EXACT = 2, 1e-9
VERIFIERS = [spec.find("verifiers", type)() for type in spec.types("verifiers")]
INDEPENDENT = [verifier for verifier in VERIFIERS if verifier.lossless and verifier.draws == "independent"]
ENUMERATED = [type for type in TREES if type != "stochastic_beam"]
"""The beam's draws are numbers, of which there are too many to enumerate."""


def taken(tree: Tree, verifier) -> bool:
    return not verifier.chains_only and (tree.draws is None or tree.draws in verifier.kinds)


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=lambda verifier: type(verifier).__name__)
@pytest.mark.parametrize("type_", ENUMERATED)
def test_the_text_has_the_targets_distribution(type_, verifier) -> None:
    tree = small(type_)
    target, drafter = Tables(1, 3), Tables(101, 3, ruled_out=0.0)
    if taken(tree, verifier):
        distribution = text_distribution(verifier, target, proposing(tree, drafter), LENGTH)
        assert total_variation(distribution, exact_distribution(target, LENGTH)) < EXACT
    else:
        with pytest.raises(ValueError, match=type(verifier).__name__):
            text_distribution(verifier, target, proposing(tree, drafter), LENGTH)


class Given(Drafter):
    """Hands up what it was made with."""

    def __init__(self, draft: Draft):
        self.draft = draft

    def propose(self, contexts, budgets):
        return [self.draft for _ in contexts]


OF_IID = [verifier for verifier in INDEPENDENT if "iid" in verifier.kinds and not verifier.chains_only]


@pytest.mark.parametrize("verifier", OF_IID, ids=lambda verifier: type(verifier).__name__)
def test_merged_drafts_have_the_targets_distribution(verifier) -> None:
    """Two draws of one drafter, one of another, and a chosen branch that may run through equal tokens."""
    target, one, two = Tables(1, 3), Tables(101, 3, ruled_out=0.0), Tables(102, 3, ruled_out=0.0)

    def propose(place: Place, sampler) -> Draft:
        def draw(model: Tables, count: int) -> Given:
            distribution = model.probs(place.text)
            tokens = [sampler.draw(0, distribution) for _ in range(count)]
            return Given(Draft().attach(tokens, (ROOT,) * count, 1, None, [distribution] * count))

        choice = Draft.chain((int(one.probs(place.text).argmax()), 0)[: place.depth], 2)
        context = Context(0, place.text, None)  # type: ignore[arg-type]
        return Merged((draw(one, 2), Given(choice), draw(two, 1))).propose([context], [Budget(2, 2)])[0]

    assert total_variation(text_distribution(verifier, target, propose, 2), exact_distribution(target, 2)) < EXACT


class Dropping(StochasticBeam):
    """Keeps what is likeliest of what was drawn: tokens are left out for being what they are."""

    def grow(self, growth, depth):
        kept = yield from super().grow(growth, depth)
        return [node for node in kept if growth.depths[node] == 0 or growth.log_probs[node] > -1.2]


def chi_square(tree: Tree, verifier, plays: int = 1500) -> float:
    """Of the first two tokens of so many plays, over the number of cells."""
    target, drafter = Tables(3, 3, ruled_out=0.0), Tables(104, 3, ruled_out=0.0)
    sampler = Sampler(False, [1], 3, "independent")
    seen: Counter = Counter()
    for _ in range(plays):
        text: tuple[int, ...] = ()
        while len(text) < LENGTH:
            draft = grown(tree, drafter, Place(text, depth=LENGTH - len(text)), sampler)
            verdict = verifier.verify(draft, TableScores(target, text, draft), sampler)
            text += (*(draft.tokens[node] for node in verdict.accepted), verdict.next_token)
        seen[text[:LENGTH]] += 1
    exact = exact_distribution(target, LENGTH)
    cells = list(product(range(3), repeat=LENGTH))
    return sum((seen[c] - plays * exact[c]) ** 2 / (plays * exact[c]) for c in cells) / (len(cells) - 1)


TAKE_BEAMS = [verifier for verifier in INDEPENDENT if "without_replacement" in verifier.kinds]


@pytest.mark.parametrize("verifier", TAKE_BEAMS, ids=lambda verifier: type(verifier).__name__)
def test_a_beam_has_the_targets_distribution(verifier) -> None:
    assert chi_square(small("stochastic_beam"), verifier) < 2.5  # 8 degrees of freedom: 0.01 of all seeds


def test_a_beam_that_drops_tokens_has_not(monkeypatch) -> None:
    monkeypatch.setattr("csdraft.decoding.tree._check_drawn", lambda *_: None)
    assert chi_square(Dropping(2), TAKE_BEAMS[0]) > 10


@pytest.mark.parametrize("type_", [type for type in TREES if small(type).draws is not None])
def test_a_child_that_was_drawn_is_not_skipped(type_) -> None:
    tree = small(type_)

    class Skipping(type(tree)):
        def grow(self, growth, depth):
            kept = yield from super().grow(growth, depth)
            return [node for node in kept if growth.ranks[node] != 0 or growth.depths[node] == 0][1:]

    sampler = Sampler(False, [1], 3, "independent")
    with pytest.raises(ValueError, match="kept child 1 of node -1 and not the one drawn before it"):
        grown(Skipping(**tree.__dict__), Tables(3, 3, ruled_out=0.0), Place((), depth=1), sampler)
