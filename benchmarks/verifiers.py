"""How many drafted tokens each multi-draft rule keeps, on random distributions: exact, with the rules that decode.

One position, one set of siblings. A rule is asked about every draft that its way of drawing can come up with, each
trial refused, which yields the probability that some trial would have succeeded. The bound is what an exact rule can
accept of such drafts (optimal transport with membership cost, SpecTr, arXiv 2310.15141): by the cut of least weight,

    min over sets A of tokens: target(A) + 1 - P(all siblings lie in A).

    python -m benchmarks verifiers
    python -m benchmarks verifiers --pairs 30 --vocabularies 8 --counts 2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft, DraftProbs, Kind
from csdraft.decoding.interfaces import Verifier
from csdraft.verifiers._stepwise import probs_without
from csdraft.verifiers.k_seq import KSeq
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.spec_hub import SpecHub
from csdraft.verifiers.without_replacement import WithoutReplacement
from csdraft_command import COUNT

__all__ = ["RULES", "acceptance", "bound", "compare", "drafts", "markdown", "random_distributions"]

Drawn = tuple[tuple[int, ...], float]
Kept = list[tuple[float, float]]

RULES: dict[str, tuple[Verifier, Kind | None]] = {
    "one draft": (Rejection(), "iid"),
    "top tokens, as point masses": (Rejection(), None),
    "Rejection (RRS)": (Rejection(), "iid"),
    "KSeq": (KSeq(), "iid"),
    "WithoutReplacement (RRSw)": (WithoutReplacement(), "without_replacement"),
    "SpecHub": (SpecHub(), "pair"),
}
"""A rule and how the siblings it judges are drawn; None: the drafter's likeliest are chosen."""


class Refusing:
    """Stands in for a `Sampler`: refuses every trial, and keeps the probability that all are refused."""

    greedy = False

    def __init__(self) -> None:
        self.refused = 1.0

    def accepts(self, row: int, probability: float) -> bool:
        self.refused *= 1 - min(probability, 1.0)
        return False

    def draw(self, row: int, probs: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class OnePosition:
    """A `ScoresView` of one distribution."""

    target_probs: Tensor
    row: int = 0

    def probs(self, node: int) -> Tensor:
        return self.target_probs

    def ends(self, node: int, token: int) -> bool:
        return False


def random_distributions(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """(vocab,) a target's and a drafter's probabilities: independent, uniform over all distributions."""
    generator = torch.Generator().manual_seed(seed)
    weights = -torch.rand(2, vocab, generator=generator, dtype=torch.float64).log()
    return tuple(weights / weights.sum(-1, keepdim=True))  # type: ignore[return-value]


def drafts(draft_probs: Tensor, kind: Kind | None, count: int) -> Iterator[Drawn]:
    """Every draft of `count` siblings with its probability."""
    if kind is None:
        yield tuple(draft_probs.topk(count).indices.tolist()), 1.0
        return
    hub = int(draft_probs.argmax())
    for tokens in product(range(len(draft_probs)), repeat=count):
        probability = 1.0
        for i, token in enumerate(tokens):
            if kind == "iid" or i == 0:
                distribution = draft_probs
            elif kind == "without_replacement" or tokens[0] == hub:
                distribution = probs_without(draft_probs, tokens[:i])
            else:
                distribution = torch.eye(len(draft_probs))[hub]
            probability *= float(distribution[token])
        if probability > 0:
            yield tokens, probability


def acceptance(verifier: Verifier, target_probs: Tensor, draft_probs: Tensor, kind: Kind | None, count: int) -> float:
    """The probability that `verifier` keeps one of `count` siblings."""
    total = 0.0
    for tokens, probability in drafts(draft_probs, kind, count):
        distribution = None if kind is None else DraftProbs(kind, (draft_probs,) * count)
        draft = Draft(tokens, (ROOT,) * count, (1,) * count, (float("nan"),) * count, distribution)
        sampler = Refusing()
        verifier.verify(draft, OnePosition(target_probs), sampler)  # type: ignore[arg-type]
        total += probability * (1 - sampler.refused)
    return total


def bound(target_probs: Tensor, draft_probs: Tensor, kind: Kind | None, count: int) -> float:
    """The most that an exact rule could accept of such drafts; exponential in the vocabulary."""
    vocab = len(target_probs)
    sets = torch.arange(1 << vocab)
    members = (sets[:, None] >> torch.arange(vocab)) & 1  # (sets, vocab)
    inside = torch.zeros(len(sets), dtype=torch.float64)
    for tokens, probability in drafts(draft_probs, kind, count):
        inside += probability * members[:, list(tokens)].all(-1).double()
    return float((members.double() @ target_probs + 1 - inside).min())


def compare(pairs: int, vocabularies: Sequence[int], count: int, seed: int = 0) -> dict[str, Kept]:
    """By rule, (acceptance, bound) for each random pair of distributions.

    Args:
        pairs: how many, their vocabularies taken in turn.
        count: siblings; `SpecHub` takes part when there are two, "one draft" has one.
    """
    found: dict[str, Kept] = {name: [] for name, (_, kind) in RULES.items() if kind != "pair" or count == 2}
    for i in range(pairs):
        distributions = random_distributions(vocabularies[i % len(vocabularies)], seed + i)
        for name, values in found.items():
            verifier, kind = RULES[name]
            siblings = 1 if name == "one draft" else count
            values.append(
                (acceptance(verifier, *distributions, kind, siblings), bound(*distributions, kind, siblings))
            )
    return found


def markdown(found: dict[str, Kept]) -> str:
    """A table: mean acceptance, mean bound, and how often a rule is at least as good as the one a line above."""
    lines = ["| rule | acceptance | bound | share of the bound | not below the rule above |", "|---|---|---|---|---|"]
    above: Kept | None = None
    for name, values in found.items():
        own, most = (sum(column) / len(values) for column in zip(*values, strict=True))
        wins = "" if above is None else f"{share_of_wins(values, above):.0%}"
        lines.append(f"| {name} | {own:.3f} | {most:.3f} | {own / most:.1%} | {wins} |")
        above = values
    return "\n".join(lines)


def share_of_wins(values: Kept, others: Kept) -> float:
    """The share of pairs on which the first rule accepts at least as much as the other."""
    return sum(a >= b - 1e-9 for (a, _), (b, _) in zip(values, others, strict=True)) / len(values)


def main(argv: Sequence[str]) -> None:
    """Prints one table for each number of siblings."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks verifiers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=COUNT, default=100, help="random pairs of a target's and a drafter's distribution"
    )
    parser.add_argument("--vocabularies", type=COUNT, nargs="+", default=[3, 4, 5], help="tokens, taken in turn")
    parser.add_argument("--counts", type=COUNT, nargs="+", default=[2, 3], help="siblings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for count in options.counts:
        print(f"\n{count} siblings, {options.pairs} pairs of distributions over {options.vocabularies} tokens\n")
        print(markdown(compare(options.pairs, options.vocabularies, count, options.seed)))
