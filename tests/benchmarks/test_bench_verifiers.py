"""The comparison of multi-draft rules: its bound against a linear programme, and the order that theory gives."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from benchmarks.__main__ import main
from benchmarks.verifiers import RULES, acceptance, bound, compare, drafts, random_distributions
from csdraft.verifiers.rejection import Rejection

pytestmark = pytest.mark.slow  # it tests what is not part of the wheel

SLACK = 1e-9


def by_linear_programme(target_probs: torch.Tensor, draft_probs: torch.Tensor, kind, count: int) -> float:
    """The greatest probability that the token is among the siblings, over all couplings of the two distributions."""
    offered = list(drafts(draft_probs, kind, count))
    vocab = len(target_probs)
    gain = [float(token in tokens) for (tokens, _), token in product(offered, range(vocab))]
    rows = np.kron(np.eye(len(offered)), np.ones(vocab))
    columns = np.kron(np.ones(len(offered)), np.eye(vocab))
    sides = [probability for _, probability in offered] + target_probs.tolist()
    solved = linprog(-np.array(gain), A_eq=np.vstack([rows, columns]), b_eq=sides)
    assert solved.success
    return -solved.fun


@pytest.mark.parametrize(
    ("kind", "count"), [("iid", 2), ("iid", 3), ("without_replacement", 2), ("pair", 2), (None, 2)]
)
def test_the_bound_is_that_of_the_linear_programme(kind, count):
    for seed in range(3):
        distributions = random_distributions(4, seed)
        assert sum(probability for _, probability in drafts(distributions[1], kind, count)) == pytest.approx(1)
        assert bound(*distributions, kind, count) == pytest.approx(
            by_linear_programme(*distributions, kind, count), abs=1e-7
        )


def test_one_draft_is_accepted_with_the_overlap():
    distributions = random_distributions(6, 1)
    overlap = float(torch.minimum(*distributions).sum())
    for verifier, kind in RULES.values():
        if kind is not None:
            assert acceptance(verifier, *distributions, kind, 1) == pytest.approx(overlap)
    assert bound(*distributions, "iid", 1) == pytest.approx(overlap)


@pytest.fixture(scope="module")
def two() -> dict:
    return compare(24, (3, 4, 5), 2)


def test_no_rule_beats_its_bound(two):
    for name, values in (two | compare(6, (3, 4), 3)).items():
        assert all(own <= most + SLACK for own, most in values), name


def test_rules_order_as_theory_says(two):
    own = {name: [value for value, _ in values] for name, values in two.items()}
    most = {name: [value for _, value in values] for name, values in two.items()}
    one, rrs, k_seq = own["one draft"], own["Rejection (RRS)"], own["KSeq"]
    without, hub = own["WithoutReplacement (RRSw)"], own["SpecHub"]
    # On every pair: a second draft never hurts, K-SEQ keeps 1 - 1/e of what is possible, SpecHub all of it.
    for more in (rrs, k_seq, without, hub):
        assert all(b >= a - SLACK for a, b in zip(one, more, strict=True))
    assert all(a >= (1 - np.exp(-1)) * b - SLACK for a, b in zip(k_seq, most["KSeq"], strict=True))
    assert hub == pytest.approx(most["SpecHub"], abs=1e-9)
    assert all(a >= b - 1e-3 for a, b in zip(k_seq, rrs, strict=True))
    # On average: what cannot repeat a refused token is worth more.
    assert sum(one) < sum(rrs) < sum(k_seq) < sum(without) < sum(hub)
    assert sum(most["Rejection (RRS)"]) < sum(hub) < sum(most["WithoutReplacement (RRSw)"])


def test_a_rule_that_accepts_too_much_would_be_seen():
    distributions = random_distributions(4, 3)
    greedy = acceptance(Rejection(1.5), *distributions, "iid", 1)
    assert greedy > bound(*distributions, "iid", 1) + 1e-3


def test_the_command_prints_a_table(capsys):
    assert main(["verifiers", "--pairs", "3", "--vocabularies", "3", "--counts", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in RULES)
