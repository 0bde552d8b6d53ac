"""Single rules by hand: lenience, greedy, ends of text, refusals, and figures computed outside this project's code."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers import _stepwise
from csdraft.verifiers.block import Block
from csdraft.verifiers.deferral import Deferral
from csdraft.verifiers.k_seq import KSeq
from csdraft.verifiers.lenient import Lenient
from csdraft.verifiers.match import Match
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.spec_hub import SpecHub
from csdraft.verifiers.traversal import Traversal
from csdraft.verifiers.typical import Typical
from csdraft.verifiers.without_replacement import WithoutReplacement
from tests.verifiers.toy import (
    Branching,
    Fixed,
    Greedy,
    Peaked,
    Place,
    Tables,
    TableScores,
    chain,
    exact_distribution,
    outcomes,
    planted,
    text_distribution,
    total_variation,
)
from tests.verifiers.trees import drawn_tree

NAN = float("nan")
TARGET = Fixed((0.42, 0.23, 0.17, 0.11, 0.07))
DRAFTER = Fixed((0.20, 0.45, 0.05, 0.25, 0.05))
ALL = [Match(), Lenient(2.0), Rejection(), Rejection(2.0), Block(), KSeq(), WithoutReplacement(), SpecHub()]
ALL += [Traversal(), Typical(), Deferral()]


def accepted(verifier, target, propose) -> dict[int, float]:
    """The distribution of the number of accepted tokens in the first round."""

    def count(sampler: Branching) -> int:
        draft = propose(Place((), depth=9), sampler)
        return len(verifier.verify(draft, TableScores(target, (), draft), sampler).accepted)

    return outcomes(count)


def mean(distribution: dict[int, float]) -> float:
    return sum(value * weight for value, weight in distribution.items())


# Figures of the literature


@pytest.mark.parametrize(("lenience", "rate", "distance"), [(1.0, 0.64, 0.0), (1.25, 0.725, 0.085), (2.0, 0.97, 0.33)])
def test_acceptance_of_a_drawn_token(lenience, rate, distance):
    verifier = Rejection(lenience)
    assert accepted(verifier, TARGET, chain(DRAFTER, "d"))[1] == pytest.approx(rate)
    distribution = text_distribution(verifier, TARGET, chain(DRAFTER, "d"), 1)
    assert total_variation(distribution, exact_distribution(TARGET, 1)) == pytest.approx(distance, abs=1e-9)


def test_acceptance_of_three_chosen_siblings():
    def propose(place, sampler):
        return planted([(1, ROOT, None), (3, ROOT, None), (0, ROOT, None)])

    assert accepted(Rejection(), TARGET, propose)[1] == pytest.approx(0.76)
    assert total_variation(text_distribution(Rejection(), TARGET, propose, 1), exact_distribution(TARGET, 1)) < 1e-9


def test_blocks_example_of_the_paper():
    target, drafter = Fixed((1 / 3, 2 / 3)), Fixed((2 / 3, 1 / 3))
    assert mean(accepted(Rejection(), target, chain(drafter, "dd"))) == pytest.approx(10 / 9)
    assert mean(accepted(Block(), target, chain(drafter, "dd"))) == pytest.approx(11 / 9)


class BlockOfThePaper(Block):
    """Algorithm 2 of arXiv 2403.10444: all running ratios first, then one trial for each length."""

    def verify(self, draft, scores, sampler, root=ROOT):
        target_probs, weights = [scores.probs(node) for node in range(ROOT, len(draft))], [1.0]
        for node in range(len(draft)):
            weights.append(min(1.0, weights[-1] * _stepwise.ratio(target_probs[node], draft, node)))
        chances = weights[1:]
        for i in range(1, len(draft)):
            if weights[i] < 1:
                probs = _stepwise.drawn_from(draft, i)
                if probs is None:
                    probs = torch.zeros_like(target_probs[i])
                    probs[draft.tokens[i]] = 1.0
                left = float((weights[i] * target_probs[i] - probs).clamp(min=0).sum())
                chances[i - 1] = left / (left + 1 - weights[i])
        kept = next((n for n in range(len(draft), 0, -1) if sampler.accepts(scores.row, chances[n - 1])), 0)
        left = target_probs[kept]
        if kept < len(draft):
            left = _stepwise.residual(weights[kept] * left, draft, kept)
        return _stepwise.accept_branch(draft, scores, root, kept - 1, lambda: sampler.draw(scores.row, left))


@pytest.mark.parametrize("kinds", ["d", "dd", "ddd", "dcd", "ccc"])
def test_traversal_of_a_chain_is_the_papers_block(kinds):
    for seed in range(3):
        target, propose = Tables(seed), chain(Tables(100 + seed), kinds)
        rules = Block(), Traversal(), BlockOfThePaper()
        block, traversal, paper = (accepted(verifier, target, propose) for verifier in rules)
        assert total_variation(block, paper) < 1e-12
        assert total_variation(traversal, paper) < 1e-12
        block, paper = (text_distribution(verifier, target, propose, 3) for verifier in (Block(), BlockOfThePaper()))
        assert total_variation(block, paper) < 1e-12


@pytest.mark.parametrize(
    ("top_down", "kind"),
    [pytest.param(Rejection(), "iid", marks=pytest.mark.slow), (WithoutReplacement(), "without_replacement")],
    ids=str,
)
def test_traversal_keeps_at_least_as_much(top_down, kind):
    for seed in range(4):
        target, propose = Tables(seed, 4), drawn_tree(Tables(100 + seed, 4), kind, (2, 2, 1))
        down, up = (mean(accepted(verifier, target, propose)) for verifier in (top_down, Traversal()))
        assert up > down + 1e-3


@pytest.mark.parametrize(
    ("verifier", "kind"),
    [(WithoutReplacement(), "without_replacement"), (Traversal(), "without_replacement"), (SpecHub(), "pair")],
    ids=str,
)
def test_a_drafter_with_two_likely_tokens_covers_a_target_that_has_no_others(verifier, kind):
    target, drafter = Fixed((0.1, 0.9, 0.0)), Fixed((0.8, 0.2, 0.0))
    assert accepted(verifier, target, drawn_tree(drafter, kind, (2,)))[1] == pytest.approx(1)


@pytest.mark.parametrize("kinds", ["d", "dd", "ddd", "dddd", "dcd", "ccc"])
def test_block_keeps_at_least_as_much(kinds):
    for seed in range(4):
        target, propose = Tables(seed), chain(Tables(100 + seed), kinds)
        token, block = (mean(accepted(verifier, target, propose)) for verifier in (Rejection(), Block()))
        assert block >= token - 1e-9
        if len(kinds) == 1 or "d" not in kinds:
            assert block == pytest.approx(token)


# Lenience


def plausible(confidence: float, lenience: float, uniform: float = 1.0, choice: int = 0, tokens=(1,)) -> list[int]:
    """Nodes kept among the root's children, the reviewer's choice being `choice` and its distribution `TARGET`'s."""

    class Coupled(Greedy):
        def level_uniform(self, row, position, level):
            assert (row, level) == (0, 7)
            assert position in (4, 5)  # after the root, after the node stepped into
            return uniform

    nodes = len(tokens)
    draft = Draft(tokens, (ROOT,) * nodes, (2,) * nodes, (confidence,) * nodes)
    scores = TableScores(TARGET, (0, 0, 0, 0), draft)
    scores.choice = lambda node: choice if node == ROOT else 4  # type: ignore[method-assign]
    return Lenient(lenience, level=7).verify(draft, scores, Coupled()).accepted


def test_lenient_keeps_what_is_plausible_enough():
    assert plausible(confidence=0.45, lenience=1.96) == [0]  # 0.45 <= 1.96 * 0.23
    assert plausible(confidence=0.45, lenience=1.95) == []
    assert plausible(confidence=0.45, lenience=1.1, uniform=0.5) == [0]
    assert plausible(confidence=0.45, lenience=1.1, uniform=0.6) == []


def test_strict_is_match():
    assert plausible(confidence=0.1, lenience=1.0) == []
    for rule in (Lenient, Rejection):
        assert (rule().lossless, rule(1.5).lossless) == (True, False)


def test_the_choice_wins_over_lenient_siblings():
    assert plausible(confidence=0.01, lenience=9.0, tokens=(1, 2, 0)) == [2]
    assert plausible(confidence=0.01, lenience=9.0, tokens=(1, 2)) == [0]


def test_point_masses_get_no_lenience():
    assert plausible(confidence=NAN, lenience=1e6) == []
    reviewer, point = Tables(1), chain(Tables(101), "ccc")
    assert (
        total_variation(text_distribution(Rejection(9.0), reviewer, point, 3), exact_distribution(reviewer, 3)) < 1e-9
    )


@pytest.mark.parametrize("verifier", [Lenient, Rejection])
def test_lenience_below_1_is_refused(verifier):
    for lenience in (0.5, 0, NAN):
        with pytest.raises(ValueError, match=rf"lenience={lenience}.*1/lenience"):
            verifier(lenience)


def test_lenient_rejection_refuses_trees():
    tree = planted([(0, ROOT, None), (1, ROOT, None)])
    with pytest.raises(ValueError, match="tree"):
        Rejection(2.0).verify(tree, TableScores(TARGET, (), tree), Branching())


# Greedy


@pytest.mark.parametrize("tokens", list(itertools.product(range(3), repeat=3)))
def test_greedy_verdicts_are_those_of_match(tokens):
    draft, target = Draft.chain(tokens), Tables(5)
    expected = Match().verify(draft, TableScores(target, (), draft), Greedy())
    scores = TableScores(Peaked(target), (), draft)
    sampler = Sampler(True, [1], vocab=3, draws="independent")
    for verifier in (Rejection(), Block(), Lenient(), KSeq(), WithoutReplacement(), SpecHub(), Traversal()):
        assert verifier.verify(draft, scores, sampler) == expected
    # The same path as for sampling: one-hot distributions leave nothing to chance.
    verdict = Rejection().verify(draft, scores, Branching())
    assert (verdict.accepted, verdict.next_token) == (expected.accepted, expected.next_token)


def test_greedy_lenience_is_the_same_rule_for_both():
    draft = Draft((1, 2), (-1, 0), (2, 2), (0.45, 0.5))
    scores = TableScores(TARGET, (), draft)
    strict, lenient = (rule.verify(draft, scores, Greedy()) for rule in (Rejection(), Rejection(2.0)))
    assert (strict.accepted, lenient.accepted, lenient.emitted_probs) == ([], [0], None)
    assert lenient == Lenient(2.0).verify(draft, scores, Greedy())


# Ends, distributions, places


@pytest.mark.parametrize("kinds", ["", "ccc", "ddd"])
@pytest.mark.parametrize("verifier", ALL, ids=repr)
def test_the_end_is_asked_once_for_each_emitted_token(verifier, kinds):
    def play(sampler):
        sampler.level_uniform = lambda *_: 0.3
        draft = chain(Tables(100), kinds)(Place(()), sampler)
        scores = TableScores(Tables(0), (), draft, eos=(2,))
        verdict = verifier.verify(draft, scores, sampler)
        tokens = [draft.tokens[node] for node in verdict.accepted]
        if verdict.next_token is not None:
            tokens.append(verdict.next_token)
        assert scores.asked == list(zip([ROOT, *verdict.accepted], tokens, strict=False))
        assert verdict.ended == (tokens[-1] == 2)
        assert 2 not in tokens[:-1]
        assert verdict.ended or verdict.next_token is not None
        if verdict.emitted_probs is not None:
            assert len(verdict.emitted_probs) == len(tokens)

    outcomes(play)


@pytest.mark.parametrize("kinds", ["ddd", "dcd"])
@pytest.mark.parametrize("verifier", [Rejection(), Block(), Traversal()], ids=repr)
def test_text_that_ends_has_the_targets_distribution(verifier, kinds):
    end, expected = 2, defaultdict(float)
    for text, weight in exact_distribution(Tables(0), 3).items():
        expected[text[: text.index(end) + 1] if end in text else text] += weight
    distribution = text_distribution(verifier, Tables(0), chain(Tables(100), kinds), 3, eos=(end,))
    assert total_variation(distribution, expected) < 1e-9


@pytest.mark.parametrize("verifier", [Match(), Lenient(2.0), Rejection(), Block(), Traversal(), Typical()], ids=repr)
def test_what_is_above_the_root_is_not_judged(verifier):
    before = Draft.chain((0, 1))
    whole, tail = before.extend((2, 0, 1), 2), Draft.chain((2, 0, 1))

    def play(draft, text, root):
        def one(sampler):
            sampler.level_uniform = lambda *_: 0.3
            verdict = verifier.verify(draft, TableScores(Tables(0), text, draft), sampler, root)
            return tuple(node - root for node in verdict.accepted), verdict.next_token

        return outcomes(one)

    assert play(whole, (), before.tip) == play(tail, (0, 1), ROOT)


def test_distributions_of_another_width_of_number_are_cast():
    distribution = torch.tensor(DRAFTER.values, dtype=torch.float32)
    draft = Draft((1,), (ROOT,), (2,), (0.45,)).relabelled(0, draft_probs=(distribution,))
    verdict = Rejection(2.0).verify(draft, TableScores(TARGET, (), draft), Branching())
    assert verdict.emitted_probs[0].dtype == torch.float64
