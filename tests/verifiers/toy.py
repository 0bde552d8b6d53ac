"""A toy world where every distribution can be written down: tables instead of models, branching instead of chance.

`Branching` stands in for the `Sampler`. Each random decision of a drafter or verifier is a Bernoulli trial (`accepts`)
or a categorical draw (`draw`); it takes one branch, multiplies the branch's probability, and remembers the others.
`outcomes` replays a play until no branch is left, so the distribution of its result comes out exactly, rounding apart.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft, DraftProbs
from csdraft.decoding.interfaces import Context, Round, Verifier
from csdraft.decoding.sampling import Sampler

NAN = float("nan")
TextDistribution = dict[tuple[int, ...], float]


@dataclass(frozen=True)
class Tables:
    """A model that is a table: a random distribution after every text, with some tokens ruled out altogether."""

    seed: int
    vocab: int = 3
    ruled_out: float = 0.15

    def probs(self, text: tuple[int, ...]) -> Tensor:
        """(vocab,) float64 probabilities of the token after `text`."""
        return _random_distribution(self, text)


@cache
def _random_distribution(tables: Tables, text: tuple[int, ...]) -> Tensor:
    chance = random.Random(repr((tables, text)))
    weights = [chance.expovariate(1) * (chance.random() >= tables.ruled_out) for _ in range(tables.vocab)]
    weights[chance.randrange(tables.vocab)] += 0.1
    distribution = torch.tensor(weights, dtype=torch.float64)
    return distribution / distribution.sum()


@dataclass(frozen=True)
class Fixed:
    """A model that gives the same distribution after every text."""

    values: tuple[float, ...]

    @property
    def vocab(self) -> int:
        return len(self.values)

    def probs(self, text: tuple[int, ...]) -> Tensor:
        del text
        return torch.tensor(self.values, dtype=torch.float64)


@dataclass(frozen=True)
class Peaked:
    """What greedy decoding makes of a model: one-hot distributions."""

    model: Tables

    @property
    def vocab(self) -> int:
        return self.model.vocab

    def probs(self, text: tuple[int, ...]) -> Tensor:
        distribution = torch.zeros(self.vocab, dtype=torch.float64)
        distribution[int(self.model.probs(text).argmax())] = 1
        return distribution


@dataclass(frozen=True)
class Single:
    """A model in single precision."""

    model: Tables

    @property
    def vocab(self) -> int:
        return self.model.vocab

    def probs(self, text: tuple[int, ...]) -> Tensor:
        return self.model.probs(text).float()


Model = Tables | Fixed | Peaked | Single


class TableScores:
    """A `ScoresView` of a table. With `noise` its choice is the Gumbel-max one, else the argmax."""

    row = 0

    def __init__(
        self, model: Model, text: tuple[int, ...], draft: Draft, noise: Sampler | None = None, eos: Sequence[int] = ()
    ):
        self.model, self.text, self.draft, self.noise, self.eos = model, text, draft, noise, eos
        self.asked: list[tuple[int, int]] = []

    def probs(self, node: int) -> Tensor:
        return self.model.probs(self.text + tuple(self.draft.tokens[i] for i in self.draft.path(node)))

    def choice(self, node: int) -> int:
        log_probs = self.probs(node).log()
        if self.noise is not None:
            log_probs = log_probs - self.noise.log_exponential(0, self.position(node), torch.device("cpu"))
        return int(log_probs.argmax())

    def soft(self, node: int, token: int) -> float:
        return float(self.probs(node)[token])

    def position(self, node: int) -> int:
        return len(self.text) + self.draft.depth(node)

    def ends(self, node: int, token: int) -> bool:
        self.asked.append((node, token))
        return token in self.eos


class Branching:
    """Takes the branches that `script` names, then the first one each time; `untried` holds the others' scripts."""

    greedy = False

    def __init__(self, script: tuple[int, ...] = ()):
        self.script, self.taken, self.weight = script, [], 1.0
        self.untried: list[tuple[int, ...]] = []

    def branch(self, probs: Sequence[float]) -> int:
        """The index of the branch taken."""
        if len(self.taken) < len(self.script):
            option = self.script[len(self.taken)]
        else:
            option, *others = [i for i, prob in enumerate(probs) if prob > 0]
            self.untried += [(*self.taken, other) for other in others]
        self.taken.append(option)
        self.weight *= probs[option] / sum(probs)
        return option

    def accepts(self, row: int, probability: float) -> bool:
        del row
        assert probability >= 0
        return self.branch([1 - min(probability, 1.0), min(probability, 1.0)]) == 1

    def draw(self, row: int, probs: Tensor) -> int:
        del row
        return self.branch(probs.tolist())


class Greedy(Branching):
    """The sampler of a greedy call: nothing is random, and the uniform numbers are 1."""

    greedy = True

    def level_uniform(self, row: int, position: int, level: int) -> float:
        del row, position, level
        return 1.0


def outcomes(play: Callable[[Branching], Hashable]) -> dict:
    """The exact distribution of what `play` returns."""
    distribution: dict = defaultdict(float)
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        sampler = Branching(scripts.pop())
        result = play(sampler)
        distribution[result] += sampler.weight
        scripts += sampler.untried
    return distribution


@dataclass(frozen=True)
class Place:
    """Where a toy drafter stands: the text, a chain that already follows it, the tokens still wanted, and what is left
    of the last round's draft."""

    text: tuple[int, ...]
    draft: Draft = field(default_factory=Draft)
    depth: int = 3
    refused: tuple[int, ...] = ()

    def path(self, draft: Draft) -> tuple[int, ...]:
        """The text and the chain `draft`."""
        return self.text + draft.tokens


Propose = Callable[[Place, Branching], Draft]


def text_distribution(
    verifier: Verifier,
    target: Model,
    propose: Propose,
    length: int,
    remembers: bool = False,
    noise: Sampler | None = None,
    eos: Sequence[int] = (),
) -> TextDistribution:
    """The exact distribution of the first `length` tokens, as many rounds as they take.

    Args:
        remembers: whether the drafter reads `Place.refused`.
        noise: the source of coupled choices.
        eos: tokens that end the text.
    """

    @cache
    def distribution_after(text: tuple[int, ...], refused: tuple[int, ...]) -> TextDistribution:
        if len(text) >= length or (text and text[-1] in eos):
            return {text[:length]: 1.0}

        def one_round(sampler: Branching) -> tuple[tuple[int, ...], tuple[int, ...]]:
            draft = propose(Place(text, depth=length - len(text), refused=refused), sampler)
            scores = TableScores(target, text, draft, noise, eos)
            verdict = verifier.verify(draft, scores, sampler)
            kept = [draft.tokens[node] for node in verdict.accepted]
            assert draft.path(verdict.accepted[-1] if kept else ROOT) == list(verdict.accepted)
            if verdict.next_token is not None:
                kept.append(verdict.next_token)
            return tuple(kept), draft.tokens[len(kept) :] if remembers else ()

        distribution: TextDistribution = defaultdict(float)
        for (tokens, left), weight in outcomes(one_round).items():
            for final, later in distribution_after(text + tokens, left).items():
                distribution[final] += weight * later
        return distribution

    return distribution_after((), ())


def exact_distribution(target: Model, length: int) -> TextDistribution:
    """The distribution of plain decoding's first `length` tokens."""
    distribution = {}
    for text in product(range(target.vocab), repeat=length):
        distribution[text] = 1.0
        for i, token in enumerate(text):
            distribution[text] *= float(target.probs(text[:i])[token])
    return distribution


def total_variation(left: dict, right: dict) -> float:
    """Half the sum of absolute differences of two distributions."""
    return sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in {*left, *right}) / 2


def drawn(draft: Draft, model: Model, place: Place, sampler: Branching) -> Draft:
    """The chain with one more token, drawn from `model`."""
    distribution = model.probs(place.path(draft))
    token = sampler.draw(0, distribution)
    return draft.extend((token,), 2, (float(distribution[token]),), (distribution,))


def chosen(draft: Draft, model: Model, place: Place) -> Draft:
    """The chain with one more token, the argmax of `model`: a point mass."""
    return draft.extend((int(model.probs(place.path(draft)).argmax()),), 2)


def planted(nodes: Sequence[tuple[int, int, Tensor | None]], kind: str = "iid") -> Draft:
    """A tree of (token, parent, distribution) nodes."""
    tokens, parents, distributions = zip(*nodes, strict=True)
    distribution = None if all(row is None for row in distributions) else DraftProbs(kind, distributions)
    return Draft(tokens, parents, (2,) * len(nodes), (NAN,) * len(nodes), distribution)


def chain(drafter: Model, kinds: str) -> Propose:
    """A chain of drawn (`d`) and chosen (`c`) tokens, in the order of `kinds`, no longer than what is wanted."""

    def propose(place: Place, sampler: Branching) -> Draft:
        draft = place.draft
        for kind in kinds[: place.depth]:
            draft = drawn(draft, drafter, place, sampler) if kind == "d" else chosen(draft, drafter, place)
        return draft

    return propose


def reviewed(inner: Verifier, reviewer: Model, below: Propose, rounds: int) -> Propose:
    """A vertical cascade: `reviewer` reviews what `below` proposes, and hands the result up with its distributions."""

    def propose(place: Place, sampler: Branching) -> Draft:
        draft = place.draft
        for _ in range(rounds):
            context = Context(0, place.text, None, draft)  # type: ignore[arg-type]
            proposed = below(Place(place.text, draft), sampler)
            scores = TableScores(reviewer, place.text, proposed)
            verdict = inner.verify(proposed, scores, sampler, context.tip)  # type: ignore[arg-type]
            draft = Round(context, proposed, verdict, 1, scores).extended
        return draft

    return propose
