"""Law 1: a verifier that says `lossless` reproduces the target's distribution for any draft. By enumeration, so
exactly.

Walks csdraft/verifiers: a new file there is held to this without being named here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import get_args

import pytest

import csdraft.verifiers
from csdraft.decoding.draft import ROOT, Draft, Kind
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.rejection import Rejection
from tests.verifiers.toy import (
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
    exact_distribution,
    outcomes,
    planted,
    reviewed,
    text_distribution,
    total_variation,
)
from tests.verifiers.trees import beam, both_sorts, drawn_tree, lone_draws, siblings

LENGTH = 3
EXACT = 1e-9


def modules() -> list:
    names = [module.name for module in pkgutil.iter_modules(csdraft.verifiers.__path__)]
    return [importlib.import_module(f"csdraft.verifiers.{name}") for name in names if name[0] != "_"]


def verifiers() -> list[Verifier]:
    return [getattr(module, name)() for module in modules() for name in module.__all__]


def named(verifier: Verifier) -> str:
    return type(verifier).__name__


LOSSLESS = [verifier for verifier in verifiers() if verifier.lossless]
INDEPENDENT = [verifier for verifier in LOSSLESS if verifier.draws == "independent"]
OF_TREES = [verifier for verifier in INDEPENDENT if not verifier.chains_only]
KINDS = get_args(Kind)
COUPLED = [verifier for verifier in LOSSLESS if verifier.draws == "coupled"]


def chosen_tree(drafter: Tables) -> Propose:
    """The two likeliest tokens, in that order; below the first again two; the same token twice below the second."""

    def propose(place: Place, sampler: Branching) -> Draft:
        del sampler
        best = drafter.probs(place.text).topk(2).indices.tolist()
        after = drafter.probs((*place.text, best[0])).topk(2).indices.tolist()
        nodes = [(best[0], ROOT), (best[1], ROOT), (after[0], 0), (after[1], 0), (0, 1), (0, 1), (1, 2)]
        return planted([(token, parent, None) for token, parent in nodes])

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
    "chosen tree": chosen_tree,
    "lone draws": lambda drafter: lone_draws(drafter, "pair"),
    "iid": lambda drafter: drawn_tree(drafter, "iid", (2, 1, 1)),
    "iid below the first": lambda drafter: drawn_tree(drafter, "iid", (1, 2)),
    "iid of both sorts": lambda drafter: both_sorts(drafter, "iid", (1,)),
    "iid, three": lambda drafter: drawn_tree(drafter, "iid", (3,)),
    "without_replacement": lambda drafter: drawn_tree(drafter, "without_replacement", (2, 2, 1)),
    "without_replacement, all tokens": lambda drafter: drawn_tree(drafter, "without_replacement", (3,)),
    "without_replacement of both sorts": lambda drafter: both_sorts(drafter, "without_replacement", (0, 2)),
    "without_replacement, exhausted": lambda drafter: drawn_tree(Peaked(drafter), "without_replacement", (2, 2)),
    "without_replacement by a beam": lambda drafter: beam(drafter, 2),
    "pair": lambda drafter: drawn_tree(drafter, "pair", (2, 2, 2)),
    "pair, exhausted": lambda drafter: drawn_tree(Peaked(drafter), "pair", (2, 2)),
    "pair of both sorts": lambda drafter: both_sorts(drafter, "pair", (0, 2, 3)),
}
SCENARIOS = CHAINS | TREES
MUST_REFUSE = {name: name.split()[0].strip(",") for name in TREES if name.split()[0].strip(",") in KINDS}
"""How the siblings of a scenario were drawn, where that matters."""


def error(verifier: Verifier, target, propose: Propose, name: str = "", length: int = LENGTH) -> float:
    """Total variation between plain decoding's first tokens and those of rounds under `verifier`."""
    remembers = name == "refused again"
    return total_variation(
        text_distribution(verifier, target, propose, length, remembers), exact_distribution(target, length)
    )


def refusal(verifier: Verifier, name: str) -> str:
    """What a rule for independent draws says against the drafts of a scenario; nothing if it must judge them."""
    kind = MUST_REFUSE.get(name)
    if kind is not None and kind not in verifier.kinds:
        return kind
    return "tree" if verifier.chains_only and name in TREES else ""


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_a_file_is_one_verifier(module):
    (name,) = module.__all__
    cls = getattr(module, name)
    assert issubclass(cls, Verifier)
    assert cls.__dataclass_params__.frozen
    assert all(item.__doc__ for item in (module, cls))
    assert cls() == cls()
    assert cls.draws in ("coupled", "independent")
    assert cls.kinds <= set(KINDS)


@pytest.mark.parametrize("more", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["", "more"])
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_text_has_the_targets_distribution(verifier, name, more):
    """For some tables; each is exact, so that one wrong rule is wrong on nearly all of them."""
    reason = refusal(verifier, name)
    if reason:
        with pytest.raises(ValueError, match=reason) as refused:
            error(verifier, Tables(0), SCENARIOS[name](Tables(100)))
        assert named(verifier) in str(refused.value)
        return
    for seed in range((1 if name in TREES else 2) + more):
        assert error(verifier, Tables(seed), SCENARIOS[name](Tables(100 + seed)), name) < EXACT


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_text_has_the_targets_distribution_with_more_tokens(verifier):
    for vocab in (4, 5):
        assert error(verifier, Tables(7, vocab), chain(Tables(107, vocab), "dd")) < EXACT


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_a_drafter_equal_to_the_target_is_always_right(verifier):
    assert error(verifier, Tables(3), chain(Tables(3), "ddd")) < EXACT


@pytest.mark.parametrize(
    ("verifier", "kind"), [pytest.param(rule, kind) for rule in OF_TREES for kind in sorted(rule.kinds)]
)
def test_trees_have_the_targets_distribution_with_more_tokens(verifier, kind):
    assert error(verifier, Tables(7, 4), drawn_tree(Tables(107, 4), kind, (2, 2)), length=2) < EXACT
    assert error(verifier, Tables(8, 5), drawn_tree(Tables(108, 5), kind, (2,)), length=2) < EXACT
    if kind != "pair":
        assert error(verifier, Tables(9, 4), drawn_tree(Tables(109, 4), kind, (3,)), length=1) < EXACT


@pytest.mark.parametrize("verifier", [rule for rule in OF_TREES if "pair" not in rule.kinds], ids=named)
def test_branches_may_be_cut_for_tokens_of_others(verifier):
    """How far one branch goes may depend on what was drawn in another, as in a beam."""
    kind = min(verifier.kinds)

    def propose(place: Place, sampler: Branching) -> Draft:
        drafter, distribution = Tables(101), Tables(101).probs(place.text)
        first, second = siblings(distribution, kind, 2, sampler)
        below = [drafter.probs((*place.text, token)) for token in (first, second)]
        later = siblings(below[1], kind, 1, sampler)
        count = (second + later[0]) % 3
        sooner = siblings(below[0], kind, count, sampler)
        nodes = [(first, ROOT, distribution), (second, ROOT, distribution)]
        return planted(nodes + [(t, 0, below[0]) for t in sooner] + [(t, 1, below[1]) for t in later], kind)

    assert error(verifier, Tables(1), propose, length=2) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_unknown_draws_are_refused_naming_both_sides(verifier, kind):
    distribution = Tables(100).probs(())
    lone, two = (
        planted([(1, ROOT, distribution)], kind),
        planted([(1, ROOT, distribution), (int(distribution.argmax()), ROOT, distribution)], kind),
    )
    verifier.verify(lone, TableScores(Tables(0), (), lone), Branching())
    if kind in verifier.kinds and not verifier.chains_only:
        verifier.verify(two, TableScores(Tables(0), (), two), Branching())
        return
    with pytest.raises(ValueError, match=kind if kind not in verifier.kinds else "tree") as refused:
        verifier.verify(two, TableScores(Tables(0), (), two), Branching())
    assert named(verifier) in str(refused.value)
    assert all(own in str(refused.value) for own in verifier.kinds - {kind})


@pytest.mark.parametrize(
    ("verifier", "kind"), [pytest.param(rule, kind) for rule in OF_TREES for kind in sorted(rule.kinds - {"iid"})]
)
def test_siblings_of_two_distributions_are_independent_or_refused(verifier, kind):
    first, second = Tables(100).probs(()), Tables(101).probs(())
    two = planted([(0, ROOT, first), (1, ROOT, second)], kind)
    with pytest.raises(ValueError, match=f"{kind}.*{named(verifier)}.*one tensor"):
        verifier.verify(two, TableScores(Tables(0), (), two), Branching())


@pytest.mark.parametrize("verifier", [rule for rule in OF_TREES if "iid" in rule.kinds], ids=named)
def test_trees_of_two_drafters_have_the_targets_distribution(verifier):
    def propose(place: Place, sampler: Branching) -> Draft:
        first, second = (Tables(seed).probs(place.text) for seed in (100, 101))
        distributions = [first, second, first, second]
        return planted([(sampler.draw(0, distribution), ROOT, distribution) for distribution in distributions], "iid")

    assert error(verifier, Tables(0), propose, length=2) < EXACT


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", COUPLED, ids=named)
def test_coupled_text_does_not_depend_on_the_draft(verifier, name):
    for seed in range(4):
        target, noise = Tables(seed), Sampler(False, [seed], vocab=3)
        text: tuple[int, ...] = ()
        for _ in range(LENGTH):
            text += (TableScores(target, text, Draft(), noise).choice(ROOT),)
        propose = SCENARIOS[name](Tables(100 + seed))
        distribution = text_distribution(verifier, target, propose, LENGTH, name == "refused again", noise)
        assert total_variation(distribution, {text: 1.0}) < EXACT


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("verifier", LOSSLESS, ids=named)
def test_one_hot_distributions_give_the_greedy_text(verifier, name):
    target = Peaked(Tables(5))
    if verifier in INDEPENDENT and (reason := refusal(verifier, name)):
        with pytest.raises(ValueError, match=reason):
            error(verifier, target, SCENARIOS[name](Tables(105)), name)
        return
    assert error(verifier, target, SCENARIOS[name](Tables(105)), name) < EXACT


@pytest.mark.parametrize("bottom", ["d", "c", "dc", "cd"])
@pytest.mark.parametrize("lenience", [1.0, 3.0])
@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_a_lenient_cascade_below_changes_nothing(verifier, lenience, bottom):
    propose = reviewed(Rejection(lenience), Tables(200), chain(Tables(100), bottom), rounds=1)
    assert error(verifier, Tables(0), propose) < EXACT


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_two_inner_rounds_and_a_tail(verifier):
    inner = reviewed(Rejection(3.0), Tables(200), chain(Tables(100), "d"), rounds=2)

    def propose(place, sampler):
        return chosen(inner(place, sampler), Tables(100), place)

    distribution = text_distribution(verifier, Tables(0), propose, 2)
    assert total_variation(distribution, exact_distribution(Tables(0), 2)) < EXACT


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_two_lenient_levels(verifier):
    lower = reviewed(Rejection(4.0), Tables(200), chain(Tables(100), "d"), rounds=1)
    upper = reviewed(Rejection(2.0), Tables(300), lower, rounds=1)
    distribution = text_distribution(verifier, Tables(0), upper, 2)
    assert total_variation(distribution, exact_distribution(Tables(0), 2)) < EXACT


@pytest.mark.parametrize("kinds", ["ddd", "ccc", "dcd", ""])
@pytest.mark.parametrize("lenience", [1.0, 2.0, 4.0])
def test_the_reported_distribution_is_the_emitted_one(lenience, kinds):
    """What `Verdict.emitted_probs` says of the first token is what enumeration finds; inner levels rely on it."""
    for seed in range(5):
        reviewer, propose = Tables(200 + seed), chain(Tables(100 + seed), kinds)

        def first(sampler, reviewer=reviewer, propose=propose):
            draft = propose(Place(()), sampler)
            verdict = Rejection(lenience).verify(draft, TableScores(reviewer, (), draft), sampler)
            assert len(verdict.emitted_probs) == len(verdict.accepted) + 1
            token = draft.tokens[verdict.accepted[0]] if verdict.accepted else verdict.next_token
            return token, tuple(verdict.emitted_probs[0].tolist())

        found = outcomes(first)
        (distribution,) = {distribution for _, distribution in found}
        assert (
            total_variation({token: weight for (token, _), weight in found.items()}, dict(enumerate(distribution)))
            < EXACT
        )


@pytest.mark.parametrize("verifier", INDEPENDENT, ids=named)
def test_single_precision_is_exact_up_to_rounding(verifier):
    for kinds in ("ddd", "dcd"):
        distribution = text_distribution(verifier, Single(Tables(0)), chain(Single(Tables(100)), kinds), LENGTH)
        assert total_variation(distribution, exact_distribution(Tables(0), LENGTH)) < 1e-6
