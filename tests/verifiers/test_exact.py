"""Law 1: a verifier that says `lossless` reproduces the target's law for any draft. By enumeration, so exactly.

Walks csdraft/verifiers: a new file there is held to this without being named here.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from toy import (
    Branching,
    Peaked,
    Place,
    Propose,
    Single,
    Tables,
    TableScores,
    chain,
    chosen,
    drawn,
    exact_law,
    law_of_text,
    outcomes,
    planted,
    reviewed,
    total_variation,
)

import csdraft.verifiers
from csdraft.decoding.draft import ROOT, Draft, Law
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.rejection import Rejection

LENGTH = 3
EXACT = 1e-9


def modules() -> list:
    names = [module.name for module in pkgutil.iter_modules(csdraft.verifiers.__path__)]
    return [importlib.import_module(f"csdraft.verifiers.{name}") for name in names]


def verifiers() -> list[Verifier]:
    return [getattr(module, name)() for module in modules() for name in module.__all__]


def named(verifier: Verifier) -> str:
    return type(verifier).__name__


LOSSLESS = [verifier for verifier in verifiers() if verifier.lossless]
INDEPENDENT = [verifier for verifier in LOSSLESS if verifier.draws == "independent"]
OF_DRAWN = [verifier for verifier in INDEPENDENT if "iid" in verifier.kinds]
COUPLED = [verifier for verifier in LOSSLESS if verifier.draws == "coupled"]


def two_drawn_siblings(drafter: Tables) -> Propose:
    """Two tokens from the same law, drawn independently, each with a drawn child."""

    def propose(place: Place, sampler: Branching) -> Draft:
        root = drafter.law(place.text)
        first, second = sampler.draw(0, root), sampler.draw(0, root)
        nodes = [(first, ROOT, root), (second, ROOT, root)]
        if place.depth > 1:
            for parent, token in enumerate((first, second)):
                law = drafter.law((*place.text, token))
                nodes.append((sampler.draw(0, law), parent, law))
        return planted(nodes)

    return propose


def siblings_of_both_sorts(drafter: Tables) -> Propose:
    """A chosen token between two drawn ones."""

    def propose(place: Place, sampler: Branching) -> Draft:
        law = drafter.law(place.text)
        nodes = [(sampler.draw(0, law), ROOT, law), (place.depth % 3, ROOT, None), (sampler.draw(0, law), ROOT, law)]
        return planted(nodes)

    return propose


def chosen_tree(drafter: Tables) -> Propose:
    """The two likeliest tokens, in that order; below the first again two; the same token twice below the second."""

    def propose(place: Place, sampler: Branching) -> Draft:
        del sampler
        best = drafter.law(place.text).topk(2).indices.tolist()
        after = drafter.law((*place.text, best[0])).topk(2).indices.tolist()
        nodes = [(best[0], ROOT), (best[1], ROOT), (after[0], 0), (after[1], 0), (0, 1), (0, 1), (1, 2)]
        return planted([(token, parent, None) for token, parent in nodes])

    return propose


def drawn_without_replacement(drafter: Tables) -> Propose:
    """Two different tokens, the second from what the first left over."""

    def propose(place: Place, sampler: Branching) -> Draft:
        law = drafter.law(place.text)
        first = sampler.draw(0, law)
        others = law.clone()
        others[first] = 0
        nodes = [(first, ROOT, law)]
        if others.sum() > 0:
            nodes.append((sampler.draw(0, others), ROOT, law))
        return planted(nodes, "without_replacement")

    return propose


def until_token_0(drafter: Tables) -> Propose:
    """Goes on drafting until it has drawn token 0, which it keeps; chooses instead of drawing after token 1."""

    def propose(place: Place, sampler: Branching) -> Draft:
        draft = place.draft
        while len(draft) < place.depth and draft.tokens[-1:] != (0,):
            sure = draft.tokens[-1:] == (1,)
            draft = chosen(draft, drafter, place) if sure else drawn(draft, drafter, place, sampler)
        return draft

    return propose


def coin_between_drafters(drafter: Tables) -> Propose:
    """Tosses a coin for each token over which of two drafters draws it."""
    other = Tables(drafter.seed + 50, drafter.vocab)

    def propose(place: Place, sampler: Branching) -> Draft:
        draft = place.draft
        for _ in range(min(2, place.depth)):
            draft = drawn(draft, drafter if sampler.accepts(0, 0.3) else other, place, sampler)
        return draft

    return propose


def refused_again(drafter: Tables) -> Propose:
    """Proposes what is left of the last round's draft as point masses, then draws one token."""

    def propose(place: Place, sampler: Branching) -> Draft:
        draft = place.draft.extend(place.refused[: place.depth], 2)
        return drawn(draft, drafter, place, sampler)

    return propose


def three_drawn_then_refused_again(drafter: Tables) -> Propose:
    """Draws two tokens in the first round, and lives on the remains afterwards."""
    again, first = refused_again(drafter), chain(drafter, "ddd")
    return lambda place, sampler: again(place, sampler) if place.text else first(place, sampler)


CHAINS = {
    "nothing": lambda drafter: chain(drafter, ""),
    "drawn": lambda drafter: chain(drafter, "ddd"),
    "chosen": lambda drafter: chain(drafter, "ccc"),
    "chosen inside": lambda drafter: chain(drafter, "dcd"),
    "chosen first": lambda drafter: chain(drafter, "cdd"),
    "chosen tail": lambda drafter: chain(drafter, "ddc"),
    "until token 0": until_token_0,
    "coin between drafters": coin_between_drafters,
    "refused again": three_drawn_then_refused_again,
}
TREES = {
    "two drawn siblings": two_drawn_siblings,
    "siblings of both sorts": siblings_of_both_sorts,
    "chosen tree": chosen_tree,
}
SCENARIOS = CHAINS | TREES
POINTS_ONLY = {"nothing", "chosen", "chosen tree"}


def error(verifier: Verifier, target, propose: Propose, name: str = "") -> float:
    """Total variation between plain decoding's first tokens and those of rounds under `verifier`."""
    remembers = name == "refused again"
    return total_variation(law_of_text(verifier, target, propose, LENGTH, remembers), exact_law(target, LENGTH))


def refusal(verifier: Verifier, name: str) -> str:
    """What a rule for independent draws says against the drafts of a scenario; nothing if it must judge them."""
    if verifier.chains_only and name in TREES:
        return "tree"
    return "" if name in POINTS_ONLY or "iid" in verifier.kinds else "iid"


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_a_file_is_one_verifier(module):
    (name,) = module.__all__
    cls = getattr(module, name)
    assert issubclass(cls, Verifier)
    assert cls.__dataclass_params__.frozen
    assert all(item.__doc__ for item in (module, cls))
    assert cls() == cls()
    assert cls.draws in ("coupled", "independent")
    assert cls.kinds <= {"iid", "without_replacement", "pair"}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_text_has_the_targets_law(verifier, name):
    reason = refusal(verifier, name)
    if reason:
        with pytest.raises(ValueError, match=reason):
            error(verifier, Tables(0), SCENARIOS[name](Tables(100)))
        return
    for seed in range(3):
        assert error(verifier, Tables(seed), SCENARIOS[name](Tables(100 + seed)), name) < EXACT


@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_text_has_the_targets_law_with_more_tokens(verifier):
    for vocab in (4, 5):
        assert error(verifier, Tables(7, vocab), chain(Tables(107, vocab), "dd")) < EXACT


@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_a_drafter_equal_to_the_target_is_always_right(verifier):
    assert error(verifier, Tables(3), chain(Tables(3), "ddd")) < EXACT


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_siblings_without_replacement_are_exact_or_refused(verifier):
    propose = drawn_without_replacement(Tables(100))
    if "without_replacement" in verifier.kinds and not verifier.chains_only:
        assert error(verifier, Tables(0), propose) < EXACT
    else:
        with pytest.raises(ValueError, match="without_replacement"):
            error(verifier, Tables(0), propose)


@pytest.mark.parametrize("kind", ["iid", "without_replacement", "pair"])
@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_unknown_laws_are_refused_naming_both_sides(verifier, kind):
    law = torch.full((3,), 1 / 3, dtype=torch.float64)
    draft = Draft((1,), (ROOT,), (2,), (0.3,), Law(kind, (law,)))
    if kind in verifier.kinds:
        verifier.verify(draft, TableScores(Tables(0), (), draft), Branching())
        return
    with pytest.raises(ValueError, match=kind) as refusal:
        verifier.verify(draft, TableScores(Tables(0), (), draft), Branching())
    assert all(own in str(refusal.value) for own in verifier.kinds)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", COUPLED, ids=named)
def test_coupled_text_does_not_depend_on_the_draft(verifier, name):
    for seed in range(4):
        target, noise = Tables(seed), Sampler(False, [seed], vocab=3)
        text: tuple[int, ...] = ()
        for _ in range(LENGTH):
            text += (TableScores(target, text, Draft(), noise).choice(ROOT),)
        propose = SCENARIOS[name](Tables(100 + seed))
        law = law_of_text(verifier, target, propose, LENGTH, name == "refused again", noise)
        assert total_variation(law, {text: 1.0}) < EXACT


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", LOSSLESS, ids=named)
def test_one_hot_laws_give_the_greedy_text(verifier, name):
    if verifier in INDEPENDENT and refusal(verifier, name):
        return
    target = Peaked(Tables(5))
    assert error(verifier, target, SCENARIOS[name](Tables(105)), name) < EXACT


@pytest.mark.parametrize("bottom", ["d", "c", "dc", "cd"])
@pytest.mark.parametrize("lenience", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_a_lenient_cascade_below_changes_nothing(verifier, lenience, bottom):
    for seed in range(2):
        propose = reviewed(Rejection(lenience), Tables(200 + seed), chain(Tables(100 + seed), bottom), rounds=1)
        assert error(verifier, Tables(seed), propose) < EXACT


@pytest.mark.parametrize("lenience", [1.0, 3.0])
@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_two_inner_rounds_and_a_tail(verifier, lenience):
    inner = reviewed(Rejection(lenience), Tables(200), chain(Tables(100), "d"), rounds=2)

    def propose(place, sampler):
        return chosen(inner(place, sampler), Tables(100), place)

    law = law_of_text(verifier, Tables(0), propose, 2)
    assert total_variation(law, exact_law(Tables(0), 2)) < EXACT


@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_two_lenient_levels(verifier):
    lower = reviewed(Rejection(4.0), Tables(200), chain(Tables(100), "d"), rounds=1)
    upper = reviewed(Rejection(2.0), Tables(300), lower, rounds=1)
    law = law_of_text(verifier, Tables(0), upper, 2)
    assert total_variation(law, exact_law(Tables(0), 2)) < EXACT


@pytest.mark.parametrize("kinds", ["ddd", "ccc", "dcd", ""])
@pytest.mark.parametrize("lenience", [1.0, 2.0, 4.0])
def test_the_reported_law_is_the_emitted_one(lenience, kinds):
    """What `Verdict.laws` says of the first token is what enumeration finds; inner levels rely on it."""
    for seed in range(5):
        reviewer, propose = Tables(200 + seed), chain(Tables(100 + seed), kinds)

        def first(sampler, reviewer=reviewer, propose=propose):
            draft = propose(Place(()), sampler)
            verdict = Rejection(lenience).verify(draft, TableScores(reviewer, (), draft), sampler)
            assert len(verdict.laws) == len(verdict.accepted) + 1
            token = draft.tokens[verdict.accepted[0]] if verdict.accepted else verdict.next_token
            return token, tuple(verdict.laws[0].tolist())

        found = outcomes(first)
        (law,) = {law for _, law in found}
        assert total_variation({token: weight for (token, _), weight in found.items()}, dict(enumerate(law))) < EXACT


@pytest.mark.parametrize("verifier", OF_DRAWN, ids=named)
def test_single_precision_is_exact_up_to_rounding(verifier):
    for kinds in ("ddd", "dcd"):
        law = law_of_text(verifier, Single(Tables(0)), chain(Single(Tables(100)), kinds), LENGTH)
        assert total_variation(law, exact_law(Tables(0), LENGTH)) < 1e-6
