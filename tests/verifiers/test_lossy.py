"""The rules that change the text's distribution: what they promise instead, by enumeration and published figures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from csdraft import MaxGram, ModelDrafter, Vertical
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.deferral import Deferral
from csdraft.verifiers.lenient import Lenient
from csdraft.verifiers.match import Match
from csdraft.verifiers.typical import Typical
from tests import tiny
from tests.verifiers.toy import (
    Branching,
    Fixed,
    Greedy,
    Place,
    Tables,
    TableScores,
    chain,
    outcomes,
    planted,
    total_variation,
)
from tests.verifiers.trees import both_sorts, drawn_tree

EXACT = 1e-9
TARGET = Fixed((0.42, 0.23, 0.17, 0.11, 0.07))
DRAFTER = Fixed((0.20, 0.45, 0.05, 0.25, 0.05))
RULES = ["chow", "diff", "opt", "token_v1", "token_v2", "token_v3"]


def distribution(model, *text: int) -> torch.Tensor:
    return model.probs(text)


# Deferral


@pytest.mark.parametrize(
    ("rule", "margin", "accepted", "distance"),
    [
        ("token_v1", 0.3, 0.924, 0.394),
        ("token_v2", 0.3, 0.754, 0.289),
        ("token_v3", 0.5, 0.763, 0.3005),
        ("chow", 0.3, 0.64, 0.0),
        ("diff", 0.1, 1.0, 0.36),
        ("opt", 0.3, 1.0, 0.36),
    ],
)
def test_figures_of_the_mixture(rule, margin, accepted, distance):
    mixture = Deferral(rule, margin).mixture(distribution(DRAFTER), distribution(TARGET))
    assert float(mixture.sum()) == pytest.approx(1)
    assert float(torch.minimum(mixture, distribution(DRAFTER)).sum()) == pytest.approx(accepted, abs=1e-6)
    assert float((mixture - distribution(TARGET)).abs().sum()) / 2 == pytest.approx(distance, abs=1e-6)


def second_token_distributions(rule: Deferral, target, propose) -> tuple[dict, dict]:
    """The distribution of the first token, and per first token that was kept, the distribution of the second."""

    def play(sampler: Branching) -> tuple:
        draft = propose(Place((), depth=2), sampler)
        verdict = rule.verify(draft, TableScores(target, (), draft), sampler)
        tokens = [draft.tokens[node] for node in verdict.accepted]
        return (*tokens, verdict.next_token)

    first: dict = defaultdict(float)
    second: dict = defaultdict(lambda: defaultdict(float))
    for tokens, weight in outcomes(play).items():
        first[tokens[0]] += weight
        if len(tokens) > 1:
            second[tokens[0]][tokens[1]] += weight
    return first, second


def close(found: dict, wanted: torch.Tensor) -> bool:
    total = sum(found.values())
    return total_variation({token: weight / total for token, weight in found.items()}, dict(enumerate(wanted))) < EXACT


@pytest.mark.parametrize("counts", [(1, 1), (2, 1, 1), (1, 2), (1, 0)], ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("rule", RULES)
def test_a_drafted_position_has_the_distribution_of_the_mixture(rule, margin, counts):
    for seed in range(3):
        deferral, target, drafter = Deferral(rule, margin), Tables(seed), Tables(100 + seed)
        first, second = second_token_distributions(deferral, target, drawn_tree(drafter, "iid", counts))
        assert close(first, deferral.mixture(distribution(drafter), distribution(target)))
        for token, found in second.items():
            drafted = counts[1] > 0
            own = distribution(target, token)
            assert close(found, deferral.mixture(distribution(drafter, token), own) if drafted else own)


@pytest.mark.parametrize("rule", RULES)
def test_what_nobody_drew_has_the_targets_distribution(rule):
    for propose in (chain(Tables(100), "cc"), chain(Tables(100), "")):
        first, second = second_token_distributions(Deferral(rule), Tables(0), propose)
        assert close(first, distribution(Tables(0)))
        assert all(close(found, distribution(Tables(0), token)) for token, found in second.items())


def test_a_chosen_sibling_beside_drawn_ones():
    deferral = Deferral("token_v3", 0.4)
    first, _ = second_token_distributions(deferral, Tables(0), both_sorts(Tables(100), "iid", (1,)))
    assert close(first, deferral.mixture(distribution(Tables(100)), distribution(Tables(0))))


def test_the_reported_distribution_is_the_mixture():
    draft = Draft((1,), (ROOT,), (2,), (0.45,)).relabelled(0, draft_probs=(distribution(DRAFTER),))
    verdict = Deferral("token_v1", 0.3).verify(draft, TableScores(TARGET, (), draft), Branching())
    assert torch.equal(
        verdict.emitted_probs[0], Deferral("token_v1", 0.3).mixture(distribution(DRAFTER), distribution(TARGET))
    )


@pytest.mark.parametrize(
    ("rule", "below", "above"),
    [  # the greatest margins at which a token of confidence .3 with target probability .23 falls, and stands
        ("chow", 0.69, 0.71),
        ("diff", 0.11, 0.13),
        ("opt", 0.11, 0.13),
        ("token_v1", 0.11, 0.13),
        ("token_v2", 0.18, 0.20),
        ("token_v3", 0.45, 0.46),
    ],
)
def test_greedy_deferral_reads_confidence(rule, below, above):
    draft = Draft((1,), (ROOT,), (2,), (0.3,))
    for margin, kept in ((below, []), (above, [0])):
        assert Deferral(rule, margin).verify(draft, TableScores(TARGET, (), draft), Greedy()).accepted == kept
    point = replace(draft, confidence=(float("nan"),))
    assert Deferral(rule, 1.0).verify(point, TableScores(TARGET, (), point), Greedy()).accepted == []


def test_greedy_deferral_prefers_the_targets_own_token():
    draft = Draft((1, 0), (ROOT, ROOT), (2, 2), (0.45, 0.01))
    verdict = Deferral("chow", 1.0).verify(draft, TableScores(TARGET, (), draft), Greedy())
    assert verdict.accepted == [1]


@pytest.mark.parametrize(
    ("options", "what"), [({"rule": "chou"}, "rule='chou'.*chow"), ({"margin": 1.5}, "margin=1.5")]
)
def test_wrong_options_of_deferral_are_refused(options, what):
    assert not Deferral().lossless
    with pytest.raises(ValueError, match=what):
        Deferral(**options)


# Typical


def typical(draft: Draft, target=TARGET, **options) -> list[int]:
    return Typical(**options).verify(draft, TableScores(target, (), draft), Greedy()).accepted


def test_the_bar_of_typical_acceptance():
    bar = Typical(threshold=0.9, entropy_share=0.5).bar(distribution(TARGET))
    entropy = -sum(p * torch.tensor(p).log().item() for p in TARGET.values)
    assert float(bar) == pytest.approx(0.5 * 2.718281828**-entropy)
    assert float(Typical(threshold=0.05).bar(distribution(TARGET))) == pytest.approx(0.05)
    assert float(Typical().bar(torch.tensor([1.0, 0.0]))) == pytest.approx(0.09)


def test_typical_keeps_what_exceeds_the_bar():
    # exp(-entropy) = 0.246: the bar is .0737 by default
    assert [typical(Draft.chain((token,))) for token in range(5)] == [[0], [0], [0], [0], []]
    assert [typical(Draft.chain((token,)), threshold=0.2, entropy_share=0.9) for token in range(5)] == [
        [0],
        [0],
        [],
        [],
        [],
    ]


def test_the_longest_typical_branch_wins_then_the_likelier():
    tree = planted([(0, ROOT, None), (1, ROOT, None), (4, 0, None), (3, 1, None), (2, 1, None), (0, 4, None)])
    assert typical(tree) == [1, 4, 5]
    short = planted([(1, ROOT, None), (0, ROOT, None), (2, 0, None), (3, 1, None), (3, 0, None)])
    assert typical(short) == [1, 3]  # .42 * .11 beats .23 * .17
    equal = planted([(1, ROOT, None), (1, ROOT, None)])
    assert typical(equal) == [0]


def test_what_follows_typical_tokens_is_the_targets_own_draw():
    noise = Sampler(False, [3], vocab=5)
    draft = Draft.chain((3,))
    verdict = Typical().verify(draft, TableScores(TARGET, (), draft, noise), noise)
    assert verdict.next_token == TableScores(TARGET, (), draft, noise).choice(0)
    assert not Typical().lossless


def test_typical_is_not_lossless_and_greedy_it_is_match():
    for token in range(5):
        draft, peaked = Draft.chain((token,)), Fixed((1.0, 0.0, 0.0, 0.0, 0.0))
        scores = TableScores(peaked, (), draft)
        assert Typical().verify(draft, scores, Greedy()) == Match().verify(draft, scores, Greedy())


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"entropy_share": -0.1}])
def test_wrong_options_of_typical_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}.*in"):
        Typical(**options)


# In generate


@pytest.mark.filterwarnings("ignore:verifier .* is not lossless")
@pytest.mark.parametrize("verifier", [Typical(), *map(Deferral, RULES)], ids=str)
def test_lossy_rules_write_text(verifier):
    inputs, new = tiny.inputs_of("llama", 2), {"max_new_tokens": 10}
    drafters = [ModelDrafter(tiny.drafter_of("llama"), depth=3), Vertical(tiny.drafter_of("llama"), MaxGram(depth=3))]
    plain = tiny.tiny("llama").generate(**inputs, **new, do_sample=False)
    for drafter in drafters:
        how = {"assistant": drafter, "verifier": verifier, "strict": True, **new}
        greedy = tiny.tiny("llama").generate(**inputs, **how, do_sample=False)
        assert torch.equal(greedy, plain) or not isinstance(verifier, Typical)
        sampled = tiny.tiny("llama").generate(**inputs, **how, do_sample=True, row_seeds=[3, 4])
        assert sampled.shape == plain.shape


@pytest.mark.filterwarnings("ignore:verifier .* is not lossless")
@pytest.mark.parametrize("verifier", [Lenient(1e9), Deferral("chow", 1.0)], ids=str)
def test_confidence_reaches_the_target(verifier):
    """A rule that keeps whatever a drafter is at all sure of keeps all of a greedy draft: drafters say how sure."""

    def kept(rule: Verifier) -> tuple[int, int]:
        how = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "strict": True}
        drafter = ModelDrafter(tiny.drafter_of("llama"), depth=3)
        output = tiny.tiny("llama").generate(
            **tiny.inputs_of("llama", 1), **how, assistant=drafter, verifier=rule, schedule="fixed"
        )
        return output.report.target.accepted.total(), output.report.target.tried.total()

    accepted, tried = kept(verifier)
    assert accepted == tried > 0
    accepted, tried = kept(Match())
    assert accepted < tried
