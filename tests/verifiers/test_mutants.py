"""Deliberate bugs, each published or seen in public code: the enumeration of `toy` must catch every one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from csdraft.decoding.draft import ROOT, Draft, DraftProbs
from csdraft.decoding.interfaces import Verdict
from csdraft.verifiers import _stepwise, k_seq, spec_hub, traversal, without_replacement
from csdraft.verifiers._stepwise import Stepwise
from csdraft.verifiers.block import Block
from csdraft.verifiers.k_seq import KSeq
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.spec_hub import SpecHub
from csdraft.verifiers.traversal import Traversal
from csdraft.verifiers.without_replacement import WithoutReplacement
from tests.verifiers.toy import (
    Branching,
    Fixed,
    Place,
    Tables,
    chain,
    chosen,
    drawn,
    exact_distribution,
    planted,
    reviewed,
    text_distribution,
    total_variation,
)
from tests.verifiers.trees import drawn_tree, siblings

CAUGHT = 1e-3
TARGET = Fixed((0.42, 0.23, 0.17, 0.11, 0.07))
DRAFTER = Fixed((0.20, 0.45, 0.05, 0.25, 0.05))


def error(verifier, propose=None, target=Tables(0)) -> float:  # noqa: B008 - a frozen table
    """Total variation of the first three tokens from plain decoding; proposes three drawn tokens by default."""
    distribution = text_distribution(verifier, target, propose or chain(Tables(100), "ddd"), 3)
    assert sum(distribution.values()) == pytest.approx(1)
    return total_variation(distribution, exact_distribution(target, 3))


def first_token_error(verifier, propose) -> float:
    return total_variation(text_distribution(verifier, TARGET, propose, 1), exact_distribution(TARGET, 1))


@pytest.fixture(autouse=True, scope="module")
def _healthy():
    """What the mutants are mutants of is exact on the same tables; looked at once, before the first of them."""
    assert max(error(Rejection()), error(Block())) < 1e-9


# The token rule


def test_no_residual_is_found(monkeypatch):
    monkeypatch.setattr(_stepwise, "residual", lambda target_probs, draft, node: target_probs)
    assert error(Rejection()) > CAUGHT
    assert error(Rejection(), chain(Tables(100), "ccc")) > CAUGHT


def test_residual_subtracts_the_draft_twice(monkeypatch):
    def twice(probs, draft, node):
        return _stepwise.left_over((probs - 2 * _stepwise.drawn_from(draft, node)).clamp(min=0), probs)

    monkeypatch.setattr(_stepwise, "residual", twice)
    assert error(Rejection()) > CAUGHT


def test_residual_removes_the_refused_token_only(monkeypatch):
    honest = _stepwise.residual
    as_point = lambda probs, draft, node: honest(probs, replace(draft, probs=None), node)  # noqa: E731
    monkeypatch.setattr(_stepwise, "residual", as_point)
    assert error(Rejection()) > CAUGHT


def test_siblings_each_start_from_the_whole_target(monkeypatch):
    """Two chosen siblings with independent trials, each against the target's own distribution."""
    monkeypatch.setattr(_stepwise, "residual", lambda target_probs, draft, node: target_probs)
    two = planted([(1, ROOT, None), (0, ROOT, None)])
    assert first_token_error(Rejection(), lambda place, sampler: two) > CAUGHT


def test_acceptance_times_1_2(monkeypatch):
    honest, weight_of = _stepwise.ratio, traversal.Place.weight_of
    monkeypatch.setattr(_stepwise, "ratio", lambda probs, draft, node: 1.2 * honest(probs, draft, node))
    monkeypatch.setattr(traversal.Place, "weight_of", lambda *where: min(1.0, 1.2 * weight_of(*where)))
    assert min(error(Rejection()), error(Block())) > CAUGHT


@dataclass(frozen=True)
class BonusFromTheParent(Rejection):
    """Off by one: the last node's distribution is read one position early."""

    def verify(self, draft, scores, sampler, root=ROOT):
        honest = scores.probs
        scores.probs = lambda node: honest(node - 1 if len(draft) and node == draft.tip else node)
        return super().verify(draft, scores, sampler, root)


def test_bonus_from_the_wrong_position():
    assert error(BonusFromTheParent(), chain(Tables(100), "d")) > CAUGHT


def test_lenience_at_the_target():
    assert error(Rejection(2.0)) > CAUGHT


# What the drafter says of its tokens


def test_argmax_draft_with_the_soft_distribution():
    def propose(place: Place, sampler: Branching) -> Draft:
        del sampler
        draft = chosen(place.draft, DRAFTER, place)
        return draft.relabelled(0, draft_probs=(DRAFTER.probs(()),))

    assert first_token_error(Rejection(), propose) == pytest.approx(0.2811, abs=1e-4)
    assert first_token_error(Block(), propose) > CAUGHT


def test_siblings_without_replacement_called_independent(monkeypatch):
    def propose(place: Place, sampler: Branching) -> Draft:
        distribution, nodes = DRAFTER.probs(()), []
        left = distribution.clone()
        for _ in range(3):
            token = sampler.draw(0, left)
            nodes.append((token, ROOT, distribution))
            left[token] = 0
        return planted(nodes, "iid")

    assert first_token_error(Rejection(), propose) > CAUGHT
    # With the right ratio, and only the residual as if they were independent, the bias is the one computed elsewhere.
    honest = _stepwise.ratio
    left = lambda draft, node: 1 - sum(DRAFTER.values[token] for token in draft.tokens[:node])  # noqa: E731
    monkeypatch.setattr(_stepwise, "ratio", lambda probs, draft, node: honest(probs, draft, node) * left(draft, node))
    assert first_token_error(Rejection(), propose) == pytest.approx(0.0358, abs=1e-4)


def test_a_token_dropped_after_a_look_at_it():
    def propose(place: Place, sampler: Branching) -> Draft:
        draft = drawn(place.draft, Tables(100), place, sampler)
        return place.draft if draft.tokens[-1] == 0 else draft

    assert error(Rejection(), propose) > CAUGHT
    assert error(Block(), propose) > CAUGHT


# What an inner reviewer says of its tokens

MIDDLE = Fixed((0.35, 0.30, 0.12, 0.15, 0.08))


def test_a_middle_distribution_is_exact_and_the_lowest_is_not():
    honest = reviewed(Rejection(), MIDDLE, chain(DRAFTER, "d"), rounds=1)
    assert first_token_error(Rejection(), honest) < 1e-9

    def wrong_level(place: Place, sampler: Branching) -> Draft:
        draft = honest(place, sampler)
        return replace(draft, probs=DraftProbs("iid", (DRAFTER.probs(()),) * len(draft)))

    assert first_token_error(Rejection(), wrong_level) == pytest.approx(0.1207, abs=1e-4)


@dataclass(frozen=True)
class ClaimsItsOwnDistribution(Rejection):
    """Algorithm 1 of the CS Drafting paper: a lenient reviewer hands up its own distribution."""

    def emitted_probs(self, draft, node, target_probs):
        return target_probs


@pytest.mark.parametrize("verifier", [Rejection(), Block()], ids=repr)
def test_a_lenient_reviewer_claims_its_own_distribution(verifier):
    honest, mutant = (
        reviewed(inner(3.0), Tables(200), chain(Tables(100), "dd"), rounds=1)
        for inner in (Rejection, ClaimsItsOwnDistribution)
    )
    assert error(verifier, honest) < 1e-9
    assert error(verifier, mutant) > CAUGHT


@dataclass(frozen=True)
class LenientWithPoints(Rejection):
    """Gives point masses the lenience that their reported distribution denies."""

    def keeps(self, draft, node, target_probs, row, sampler):
        for child in draft.children(node):
            if sampler.accepts(row, self.lenience * _stepwise.ratio(target_probs, draft, child)):
                return child, target_probs
            return None, _stepwise.residual(target_probs, draft, child)
        return None, target_probs


def test_lenience_for_point_masses_behind_the_distributions_back():
    mutant = reviewed(LenientWithPoints(3.0), Tables(200), chain(Tables(100), "cc"), rounds=1)
    assert error(Rejection(), mutant) > CAUGHT


# The block rule


@dataclass(frozen=True)
class Trials(Block):
    """The block rule with its trials in one function, `longest`, as the paper writes them."""

    def last(self, draft, scores, sampler, root):
        places = [traversal.Place(root, 1.0, scores.probs(root), iter(()))]
        for child in range(root + 1, len(draft)):
            weight = places[-1].weight_of(draft, child)
            places.append(traversal.Place(child, weight, scores.probs(child), iter(())))
        chances = [place.weight for place in places[1:]]  # of keeping the first 1, 2, ... tokens
        for place, above in zip(places[:0:-1], places[-2::-1], strict=True):
            above.refuse(draft, place.node)
        chances[:-1] = [place.weight for place in places[1:-1]]
        return places[self.longest(chances, scores.row, sampler)]

    def longest(self, chances, row, sampler):
        return next((n for n in range(len(chances), 0, -1) if sampler.accepts(row, chances[n - 1])), 0)


@dataclass(frozen=True)
class StopsAtTheFirstFailure(Trials):
    def longest(self, chances, row, sampler):
        for length, chance in enumerate(chances):
            if not sampler.accepts(row, chance):
                return length
        return len(chances)


@dataclass(frozen=True)
class OneUniformForAll(Trials):
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
class LastTokenLikeTheOthers(Trials):
    """Forgets that the last token's chance is its weight: divides as if a next token had been drafted."""

    def longest(self, chances, row, sampler):
        chances = list(chances)
        if chances and chances[-1] < 1:
            chances[-1] = chances[-1] / (chances[-1] + 1)
        return super().longest(chances, row, sampler)


@pytest.mark.parametrize("mutant", [StopsAtTheFirstFailure(), OneUniformForAll(), LastTokenLikeTheOthers()], ids=repr)
def test_block_trials(mutant):
    cases = [(chain(Tables(100 + seed), "ddd"), Tables(seed)) for seed in range(3)]
    assert max(error(Trials(), *case) for case in cases) < 1e-9
    assert max(error(mutant, *case) for case in cases) > CAUGHT


# Wrong sampling rules of public code


@dataclass(frozen=True)
class ResamplesAfterAMismatch(Stepwise):
    """Compares a child with a draw of the target, and on a mismatch draws anew (REST, Medusa's nucleus mode)."""

    def keeps(self, draft, node, aim, row, sampler):
        drawn = sampler.draw(row, aim)
        return draft.child(node, drawn), aim


@dataclass(frozen=True)
class DrawsForEachCandidate(Stepwise):
    """Draws a target token for each candidate path, not for each node of the tree (the same two)."""

    def keeps(self, draft, node, aim, row, sampler):
        for child in draft.children(node):
            if (drawn := sampler.draw(row, aim)) == draft.tokens[child]:
                return child, aim
        return None, torch.eye(len(aim), dtype=aim.dtype)[drawn] if draft.children(node) else aim


@dataclass(frozen=True)
class LongestOfAll(Stepwise):
    """Tries every branch by itself and takes the longest (ReDrafter, GSD; GSD also draws from the whole target)."""

    whole: bool

    def verify(self, draft, scores, sampler, root=ROOT):
        best, nodes = [], [(root, [])]
        while nodes:
            node, path = nodes.pop()
            best = max(best, path, key=len)
            for child in draft.children(node):
                if sampler.accepts(0, _stepwise.ratio(scores.probs(node), draft, child)):
                    nodes.append((child, [*path, child]))
        node = best[-1] if best else root
        left = scores.probs(node)
        if draft.children(node) and not self.whole:
            left = _stepwise.residual(left, draft, draft.children(node)[0])
        return Verdict(best, sampler.draw(0, left), False)


CHOSEN_TWICE = planted([(1, ROOT, None), (0, ROOT, None), (1, 0, None), (0, 1, None)])


@pytest.mark.parametrize(
    "mutant", [ResamplesAfterAMismatch(), DrawsForEachCandidate(), LongestOfAll(True), LongestOfAll(False)], ids=repr
)
def test_wrong_rules_for_chosen_tokens(mutant):
    propose = lambda place, sampler: CHOSEN_TWICE  # noqa: E731
    assert max(error(rule, propose) for rule in (Rejection(), KSeq(), WithoutReplacement(), Traversal())) < 1e-9
    assert error(mutant, propose) > CAUGHT


@dataclass(frozen=True)
class ResamplesFromItsWholeDistribution(Rejection):
    """A middle level that draws its correction from its own whole distribution (TriForce)."""

    def keeps(self, draft, node, aim, row, sampler):
        kept, _ = super().keeps(draft, node, aim, row, sampler)
        return kept, aim


def test_a_middle_level_without_a_residual():
    mutant = reviewed(ResamplesFromItsWholeDistribution(), MIDDLE, chain(DRAFTER, "d"), rounds=1)
    assert first_token_error(Rejection(), mutant) > CAUGHT


@pytest.mark.parametrize("verifier", [WithoutReplacement(), Traversal()], ids=repr)
def test_siblings_pruned_by_their_probability(verifier):
    """Drawn without replacement, then those that the drafter finds unlikely are left out, the distribution kept."""

    def propose(place: Place, sampler: Branching, least: float) -> Draft:
        distribution = DRAFTER.probs(())
        tokens = [
            token
            for token in siblings(distribution, "without_replacement", 3, sampler)
            if distribution[token] >= least
        ]
        return planted([(token, ROOT, distribution) for token in tokens], "without_replacement")

    assert first_token_error(verifier, lambda place, sampler: propose(place, sampler, 0.0)) < 1e-9
    assert first_token_error(verifier, lambda place, sampler: propose(place, sampler, 0.1)) > CAUGHT


@pytest.mark.parametrize(
    ("verifier", "drawn", "said"),
    [
        (WithoutReplacement(), "iid", "without_replacement"),
        (WithoutReplacement(), "pair", "without_replacement"),
        (Traversal(), "without_replacement", "iid"),
        (Traversal(), "iid", "without_replacement"),
        (KSeq(), "without_replacement", "iid"),
        (KSeq(), "pair", "iid"),
        (Rejection(), "pair", "iid"),
    ],
    ids=str,
)
def test_draws_that_are_called_something_else(verifier, drawn, said):
    def propose(place: Place, sampler: Branching) -> Draft:
        distribution = DRAFTER.probs(())
        return planted([(token, ROOT, distribution) for token in siblings(distribution, drawn, 2, sampler)], said)

    assert first_token_error(verifier, propose) > CAUGHT


@pytest.mark.parametrize("verifier", [KSeq(), WithoutReplacement(), SpecHub(), Traversal()], ids=repr)
def test_chosen_siblings_with_the_soft_distribution(verifier):
    """The likeliest two, verified as if they had been drawn."""

    def propose(place: Place, sampler: Branching) -> Draft:
        distribution = DRAFTER.probs(())
        return planted(
            [(token, ROOT, distribution) for token in distribution.topk(2).indices.tolist()], min(verifier.kinds)
        )

    assert first_token_error(verifier, propose) > CAUGHT


# Each multi-draft rule


def of_kind(kind: str, *counts: int):
    return drawn_tree(DRAFTER, kind, counts)


def test_without_replacement_forgets_what_is_gone(monkeypatch):
    assert first_token_error(WithoutReplacement(), of_kind("without_replacement", 3)) < 1e-9
    monkeypatch.setattr(without_replacement, "probs_without", lambda draft_probs, tokens: draft_probs)
    assert first_token_error(WithoutReplacement(), of_kind("without_replacement", 3)) > CAUGHT


def test_an_exhausted_distribution_stays_empty(monkeypatch):
    one_hot = Fixed((0.0, 1.0, 0.0, 0.0, 0.0))
    for verifier, module in ((WithoutReplacement(), without_replacement), (Traversal(), traversal)):
        propose = drawn_tree(one_hot, "without_replacement", (3,))
        assert first_token_error(verifier, propose) < 1e-9
        empty = lambda draft_probs, tokens: draft_probs.clone().index_fill_(0, torch.tensor(tokens, dtype=int), 0)  # noqa: E731
        monkeypatch.setattr(module, "probs_without", empty)
        assert first_token_error(verifier, propose) > CAUGHT


@pytest.mark.parametrize("rho", [1.0, 1.2])
def test_k_seq_with_too_low_a_bar(monkeypatch, rho):
    assert first_token_error(KSeq(), of_kind("iid", 3)) < 1e-9
    monkeypatch.setattr(k_seq, "least_rho", lambda target_probs, draft_probs, count: rho)
    assert first_token_error(KSeq(), of_kind("iid", 3)) > CAUGHT


def test_k_seq_with_the_residual_of_one_trial(monkeypatch):
    monkeypatch.setattr(k_seq, "any_of", lambda one, count: one)
    monkeypatch.setattr(k_seq, "least_rho", lambda target_probs, draft_probs, count: 3.0)
    assert first_token_error(KSeq(), of_kind("iid", 3)) > CAUGHT


def test_k_seq_where_the_count_follows_the_tokens():
    def propose(place: Place, sampler: Branching) -> Draft:
        distribution = DRAFTER.probs(())
        first = sampler.draw(0, distribution)
        tokens = [first, sampler.draw(0, distribution)] if first == 1 else [first]
        return planted([(token, ROOT, distribution) for token in tokens])

    assert first_token_error(Rejection(), propose) < 1e-9
    assert first_token_error(KSeq(), propose) > CAUGHT


def test_spec_hub_forgets_how_the_hub_leads(monkeypatch):
    """Takes the other token's distribution for the drafter's own, the hub not removed."""
    assert first_token_error(SpecHub(), of_kind("pair", 2)) < 1e-9
    monkeypatch.setattr(spec_hub, "probs_without", lambda draft_probs, tokens: draft_probs)
    assert first_token_error(SpecHub(), of_kind("pair", 2)) > CAUGHT


def test_spec_hub_gives_the_same_mass_twice(monkeypatch):
    honest = spec_hub.supply
    monkeypatch.setattr(spec_hub, "supply", lambda wanted, offered: (wanted, *honest(wanted, offered)[1:]))
    assert first_token_error(SpecHub(), of_kind("pair", 2)) > CAUGHT


@pytest.mark.parametrize("bug", ["keeps its weight", "keeps its distribution", "scales the residual away"])
@pytest.mark.parametrize("kind", ["iid", "without_replacement", "chain"])
def test_traversal_after_a_refusal(monkeypatch, kind, bug):
    propose = chain(Tables(100), "ddd") if kind == "chain" else drawn_tree(Tables(100), kind, (2, 2))
    assert error(Traversal(), propose) < 1e-9
    honest = traversal.Place.refuse

    def refuse(place, draft, child):
        weight, left = place.weight, place.left
        if bug == "scales the residual away":
            place.weight = 1.0
        honest(place, draft, child)
        if bug == "keeps its weight":
            place.weight = weight
        elif bug == "keeps its distribution":
            place.left = left

    monkeypatch.setattr(traversal.Place, "refuse", refuse)
    assert error(Traversal(), propose) > CAUGHT
