"""Deliberate bugs, each published or seen in public code: the enumeration of `toy` must catch every one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from toy import (
    Branching,
    Fixed,
    Place,
    Tables,
    chain,
    chosen,
    drawn,
    exact_law,
    law_of_text,
    planted,
    reviewed,
    total_variation,
)

from csdraft.decoding.draft import ROOT, Draft, Law
from csdraft.verifiers import block, rejection
from csdraft.verifiers.block import Block
from csdraft.verifiers.rejection import Rejection

CAUGHT = 1e-3
TARGET = Fixed((0.42, 0.23, 0.17, 0.11, 0.07))
DRAFTER = Fixed((0.20, 0.45, 0.05, 0.25, 0.05))


def error(verifier, propose=None, target=Tables(0)) -> float:  # noqa: B008 - a frozen table
    """Total variation of the first three tokens from plain decoding; proposes three drawn tokens by default."""
    law = law_of_text(verifier, target, propose or chain(Tables(100), "ddd"), 3)
    assert sum(law.values()) == pytest.approx(1)
    return total_variation(law, exact_law(target, 3))


def first_token_error(verifier, propose) -> float:
    return total_variation(law_of_text(verifier, TARGET, propose, 1), exact_law(TARGET, 1))


@pytest.fixture(autouse=True)
def _healthy():
    """What the mutants are mutants of is exact on the same tables."""
    assert max(error(Rejection()), error(Block())) < 1e-9


# The token rule


def test_no_residual(monkeypatch):
    monkeypatch.setattr(rejection, "residual", lambda target_probs, draft, node: target_probs)
    assert error(Rejection()) > CAUGHT
    assert error(Rejection(), chain(Tables(100), "ccc")) > CAUGHT


def test_residual_subtracts_the_draft_twice(monkeypatch):
    once = rejection.unexplained
    monkeypatch.setattr(
        rejection, "unexplained", lambda probs, draft, node: once(once(probs, draft, node), draft, node)
    )
    assert error(Rejection()) > CAUGHT


def test_residual_removes_the_refused_token_only(monkeypatch):
    honest = rejection.unexplained
    as_point = lambda probs, draft, node: honest(probs, replace(draft, law=None), node)  # noqa: E731
    monkeypatch.setattr(rejection, "unexplained", as_point)
    assert error(Rejection()) > CAUGHT


def test_siblings_each_start_from_the_whole_target(monkeypatch):
    """Two chosen siblings with independent trials, each against the target's own law."""
    monkeypatch.setattr(rejection, "residual", lambda target_probs, draft, node: target_probs)
    two = planted([(1, ROOT, None), (0, ROOT, None)])
    assert first_token_error(Rejection(), lambda place, sampler: two) > CAUGHT


@pytest.mark.parametrize("module", [rejection, block])
def test_acceptance_times_1_2(monkeypatch, module):
    honest = rejection.ratio
    monkeypatch.setattr(module, "ratio", lambda probs, draft, node: 1.2 * honest(probs, draft, node))
    assert error(Rejection() if module is rejection else Block()) > CAUGHT


@dataclass(frozen=True)
class BonusFromTheParent(Rejection):
    """Off by one: the last node's law is read one position early."""

    def verify(self, draft, scores, sampler, root=ROOT):
        honest = scores.probs
        scores.probs = lambda node: honest(node - 1 if len(draft) and node == draft.tip else node)
        return super().verify(draft, scores, sampler, root)


def test_bonus_from_the_wrong_position():
    assert error(BonusFromTheParent(), chain(Tables(100), "d")) > CAUGHT


def test_lenience_at_the_target():
    assert error(Rejection(2.0)) > CAUGHT


# What the drafter says of its tokens


def test_argmax_draft_with_the_soft_law():
    def propose(place: Place, sampler: Branching) -> Draft:
        del sampler
        draft = chosen(place.draft, DRAFTER, place)
        return draft.relabelled(0, laws=(DRAFTER.law(()),))

    assert first_token_error(Rejection(), propose) == pytest.approx(0.2811, abs=1e-4)
    assert first_token_error(Block(), propose) > CAUGHT


def test_siblings_without_replacement_called_independent(monkeypatch):
    def propose(place: Place, sampler: Branching) -> Draft:
        law, nodes = DRAFTER.law(()), []
        left = law.clone()
        for _ in range(3):
            token = sampler.draw(0, left)
            nodes.append((token, ROOT, law))
            left[token] = 0
        return planted(nodes, "iid")

    assert first_token_error(Rejection(), propose) > CAUGHT
    # With the right ratio, and only the residual as if they were independent, the bias is the one computed elsewhere.
    honest = rejection.ratio
    left = lambda draft, node: 1 - sum(DRAFTER.probs[token] for token in draft.tokens[:node])  # noqa: E731
    monkeypatch.setattr(rejection, "ratio", lambda probs, draft, node: honest(probs, draft, node) * left(draft, node))
    assert first_token_error(Rejection(), propose) == pytest.approx(0.0358, abs=1e-4)


def test_a_token_dropped_after_a_look_at_it():
    def propose(place: Place, sampler: Branching) -> Draft:
        draft = drawn(place.draft, Tables(100), place, sampler)
        return place.draft if draft.tokens[-1] == 0 else draft

    assert error(Rejection(), propose) > CAUGHT
    assert error(Block(), propose) > CAUGHT


# What an inner reviewer says of its tokens

MIDDLE = Fixed((0.35, 0.30, 0.12, 0.15, 0.08))


def test_a_middle_law_is_exact_and_the_lowest_is_not():
    honest = reviewed(Rejection(), MIDDLE, chain(DRAFTER, "d"), rounds=1)
    assert first_token_error(Rejection(), honest) < 1e-9

    def wrong_level(place: Place, sampler: Branching) -> Draft:
        draft = honest(place, sampler)
        return replace(draft, law=Law("iid", (DRAFTER.law(()),) * len(draft)))

    assert first_token_error(Rejection(), wrong_level) == pytest.approx(0.1207, abs=1e-4)


@dataclass(frozen=True)
class ClaimsItsOwnLaw(Rejection):
    """Algorithm 1 of the CS Drafting paper: a lenient reviewer hands up its own law."""

    def emitted_law(self, draft, node, target_probs):
        return target_probs


@pytest.mark.parametrize("verifier", [Rejection(), Block()], ids=repr)
def test_a_lenient_reviewer_claims_its_own_law(verifier):
    honest, mutant = (
        reviewed(inner(3.0), Tables(200), chain(Tables(100), "dd"), rounds=1) for inner in (Rejection, ClaimsItsOwnLaw)
    )
    assert error(verifier, honest) < 1e-9
    assert error(verifier, mutant) > CAUGHT


@dataclass(frozen=True)
class LenientWithPoints(Rejection):
    """Gives point masses the lenience that their reported law denies."""

    def keeps(self, draft, node, target_probs, row, sampler):
        for child in draft.children(node):
            if sampler.accepts(row, self.lenience * rejection.ratio(target_probs, draft, child)):
                return child, target_probs
            return None, rejection.residual(target_probs, draft, child)
        return None, target_probs


def test_lenience_for_point_masses_behind_the_laws_back():
    mutant = reviewed(LenientWithPoints(3.0), Tables(200), chain(Tables(100), "cc"), rounds=1)
    assert error(Rejection(), mutant) > CAUGHT


# The block rule


@dataclass(frozen=True)
class StopsAtTheFirstFailure(Block):
    def longest(self, chances, row, sampler):
        for length, chance in enumerate(chances):
            if not sampler.accepts(row, chance):
                return length
        return len(chances)


@dataclass(frozen=True)
class OneUniformForAll(Block):
    def longest(self, chances, row, sampler):
        """Deepest first with one number: a trial that comes after failures is conditioned on them."""
        failed = 0.0
        for length in range(len(chances), 0, -1):
            chance = chances[length - 1]
            if chance > failed and sampler.accepts(row, (chance - failed) / (1 - failed)):
                return length
            failed = max(failed, chance)
        return 0


@dataclass(frozen=True)
class LastTokenLikeTheOthers(Block):
    """Forgets that the last token's chance is its weight: divides as if a next token had been drafted."""

    def longest(self, chances, row, sampler):
        chances = list(chances)
        if chances and chances[-1] < 1:
            chances[-1] = chances[-1] / (chances[-1] + 1)
        return super().longest(chances, row, sampler)


@pytest.mark.parametrize("mutant", [StopsAtTheFirstFailure(), OneUniformForAll(), LastTokenLikeTheOthers()], ids=repr)
def test_block_trials(mutant):
    assert max(error(mutant, chain(Tables(100 + seed), "ddd"), Tables(seed)) for seed in range(3)) > CAUGHT


def test_block_with_the_unscaled_residual(monkeypatch):
    honest = rejection.residual
    monkeypatch.setattr(block, "residual", lambda probs, draft, node: honest(probs / probs.sum(), draft, node))
    assert error(Block()) > CAUGHT
