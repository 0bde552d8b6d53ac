"""Finds the children of a tree's nodes from the logits after them: the likeliest tokens, or drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csdraft.decoding.draft import Kind
from csdraft.decoding.processing import Place
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import NAN, Scores

__all__ = ["Children", "Question", "find_children"]


@dataclass(eq=False)
class Children:
    """The children of one node, in the order in which they are proposed; see `Growth` for the lists' meaning.

    Attributes:
        probs: (vocab,) distribution that they were drawn from; None if they were chosen.
    """

    tokens: list[int]
    log_probs: list[float]
    perturbed: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    probs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """The nodes that one row's tree expands in a step.

    Attributes:
        scores: scores of one forward, after exactly these nodes.
        nodes: the nodes to expand.
        width: the most children of each node.
        above: (nodes,) log probability of each node's path; needed for `most`.
        most: keep only this many children in all, those with the likeliest paths (ties with the last one stay too).
    """

    scores: Scores
    nodes: Sequence[int]
    width: int
    above: Sequence[float] = ()
    most: int | None = None


def find_children(questions: Sequence[Question], draws: Kind | None, confidence: bool = False) -> list[list[Children]]:
    """For each question, the children of each of its nodes: chosen, or drawn under independent draws.

    Chosen children come to the host in one copy for all rows.

    Args:
        draws: how to draw under independent draws; see `Tree.draws`.
        confidence: whether to compute the children's softmax probabilities at the call's temperature.
    """
    chooser = questions[0].scores.chooser
    if draws is None or chooser.sampler.greedy or chooser.sampler.coupled:
        soft = torch.cat([chooser.soft(question.scores.logits) for question in questions]) if confidence else None
        return _likeliest(torch.cat([_noisy(question) for question in questions]), questions, soft)
    found = []
    for question in questions:
        if question.most is not None:
            raise ValueError(
                f"most={question.most} drops children because of their tokens; a tree that draws {draws!r} must not "
                "set it"
            )
        scores = question.scores
        children = [
            _drawn(scores.row, chooser.sampler, row, question.width, draws)
            for row in _values(question).log_softmax(-1)
        ]
        if confidence:
            for own, row in zip(children, chooser.soft(scores.logits), strict=True):
                own.confidence = row[own.tokens].tolist()
        found.append(children)
    return found


def _values(question: Question) -> Tensor:
    """(nodes, vocab) float32 scores after each node, after the level's processors."""
    scores, processing = question.scores, question.scores.chooser.processing
    if processing.at_once:
        place = Place(scores.row, scores.text, scores.draft, question.nodes)
        return processing.all_at_once(scores.logits, processing.before([place], scores.logits)).float()
    return torch.stack([scores.processed(node) for node in question.nodes]).float()


def _noisy(question: Question) -> Tensor:
    """(nodes, vocab) scores minus the noise of the position after each node; nodes of one depth share a position."""
    scores, values = question.scores, _values(question)
    sampler = scores.chooser.sampler
    if sampler.greedy or not sampler.coupled:
        return values
    return values - sampler.noise([(scores.row, scores.position(node)) for node in question.nodes], values.device)


def _likeliest(values: Tensor, questions: Sequence[Question], soft: Tensor | None = None) -> list[list[Children]]:
    """The likeliest children of all rows' nodes, in one copy to the host.

    Args:
        values: (all nodes, vocab) scores of all questions, one after the other.
        soft: (all nodes, vocab) probabilities, if the children's confidence is wanted.
    """
    widest = min(max(question.width for question in questions), values.shape[-1])
    top = values.log_softmax(-1).topk(widest, -1)  # (all nodes, widest)
    columns = [top.indices.double(), top.values.double()]  # (all nodes, widest) each
    if soft is not None:
        columns.append(soft.gather(1, top.indices).double())
    table = torch.stack(columns).cpu().numpy()  # (2 or 3, all nodes, widest)
    if np.isnan(table[1]).any():
        raise ValueError(NAN)
    found, first = [], 0
    for question in questions:
        found.append(_kept(question, table[:, first : first + len(question.nodes), : question.width]))
        first += len(question.nodes)
    return found


def _kept(question: Question, table: np.ndarray) -> list[Children]:
    """The children that a question keeps, from (2 or 3, nodes, width) tokens, log probabilities and confidence."""
    logs = table[1]  # (nodes, width)
    kept = logs > -np.inf
    if question.most is not None and question.most < logs.size:
        paths = logs + np.array(question.above)[:, None]  # (nodes, width)
        kept &= paths >= np.partition(paths, -question.most, None)[-question.most]
    children = []
    for node, count in enumerate(kept.sum(1).tolist()):  # children are sorted, so the kept ones are the first
        tokens, log_probs, *confidence = (column[node, :count].tolist() for column in table)
        children.append(Children([int(token) for token in tokens], log_probs, [], *confidence))
    return children


def _drawn(row: int, sampler: Sampler, log_probs: Tensor, width: int, draws: Kind) -> Children:
    """Draws children from (vocab,) log probabilities, in the order in which a verifier must try them."""
    probs, perturbed = log_probs.exp(), []
    if draws == "iid":
        tokens = [sampler.draw(row, probs) for _ in range(width)]
    elif draws == "without_replacement":  # Gumbel-top-k: Kool, van Hoof and Welling, arXiv 1903.06059
        values = log_probs - sampler.fresh_log_exponential(row, log_probs.device)
        top = values.topk(min(width, int((probs > 0).sum())))
        tokens, perturbed = top.indices.tolist(), top.values.tolist()
    else:
        tokens = _pair(row, sampler, probs)[:width]
    return Children(tokens, log_probs[tokens].tolist(), perturbed, probs=probs)


def _pair(row: int, sampler: Sampler, probs: Tensor) -> list[int]:
    """SpecHub's pair (arXiv 2411.05289): the likeliest token, and another token drawn from the distribution."""
    hub, first = int(probs.argmax()), sampler.draw(row, probs)
    if first != hub:
        return [first, hub]
    others = probs.clone()
    others[hub] = 0
    return [hub, sampler.draw(row, others)] if others.sum() > 0 else [hub]
