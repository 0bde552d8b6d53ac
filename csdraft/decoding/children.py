"""Finds the children of a tree's nodes from the logits after them: the likeliest tokens, or drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csdraft.decoding.draft import Kind
from csdraft.decoding.interfaces import Step
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import NAN, Scores

__all__ = ["Children", "find_children"]


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


def find_children(
    views: Sequence[Scores],
    steps: Sequence[Step],
    above: Sequence[Sequence[float]],
    draws: Kind | None,
    confidence: bool = False,
) -> list[list[Children]]:
    """For each row, the children of each node that was scored: chosen, or drawn under independent draws.

    Chosen children come to the host in one copy for all rows.

    Args:
        views: the scores after the nodes that each row expands.
        steps: how many children each row wants. If `most` drops some, ties with the last one stay too.
        above: for each row (nodes,) log probability of each node's path; needed for `most`.
        draws: how to draw under independent draws; see `Tree.draws`.
        confidence: whether to compute the children's softmax probabilities at the call's temperature.
    """
    chooser = views[0].chooser
    if draws is None or chooser.sampler.greedy or chooser.sampler.coupled:
        soft = torch.cat([chooser.soft(view.logits) for view in views]) if confidence else None
        return _likeliest(torch.cat([_noisy(view) for view in views]), steps, above, soft)
    found = []
    for view, step in zip(views, steps, strict=True):
        if step.most is not None:
            raise ValueError(
                f"most={step.most} drops children because of their tokens; a tree that draws {draws!r} must not set it"
            )
        rows = _values(view).log_softmax(-1)
        children = [_drawn(view.row, chooser.sampler, row, step.width, draws) for row in rows]
        if confidence:
            for own, row in zip(children, chooser.soft(view.logits), strict=True):
                own.confidence = row[own.tokens].tolist()
        found.append(children)
    return found


def _values(view: Scores) -> Tensor:
    """(nodes, vocab) float32 scores after each node, after the level's processors."""
    processing = view.chooser.processing
    if processing.at_once:
        return processing.all_at_once(view.logits, processing.before([view.request], view.logits)).float()
    return torch.stack([view.processed(node) for node in view.request.after]).float()


def _noisy(view: Scores) -> Tensor:
    """(nodes, vocab) scores minus the noise of the position after each node; nodes of one depth share a position."""
    values, sampler = _values(view), view.chooser.sampler
    if sampler.greedy or not sampler.coupled:
        return values
    return values - sampler.noise([(view.row, view.position(node)) for node in view.request.after], values.device)


def _likeliest(
    values: Tensor, steps: Sequence[Step], above: Sequence[Sequence[float]], soft: Tensor | None = None
) -> list[list[Children]]:
    """The likeliest children of all rows' nodes, in one copy to the host.

    Args:
        values: (all nodes, vocab) scores of all rows, one after the other.
        soft: (all nodes, vocab) probabilities, if the children's confidence is wanted.
    """
    widest = min(max(step.width for step in steps), values.shape[-1])
    top = values.log_softmax(-1).topk(widest, -1)  # (all nodes, widest)
    columns = [top.indices.double(), top.values.double()]  # (all nodes, widest) each
    if soft is not None:
        columns.append(soft.gather(1, top.indices).double())
    table = torch.stack(columns).cpu().numpy()  # (2 or 3, all nodes, widest)
    if np.isnan(table[1]).any():
        raise ValueError(NAN)
    found, first = [], 0
    for step, own in zip(steps, above, strict=True):
        found.append(_kept(step.most, own, table[:, first : first + len(own), : step.width]))
        first += len(own)
    return found


def _kept(most: int | None, above: Sequence[float], table: np.ndarray) -> list[Children]:
    """The children that a row keeps, from (2 or 3, nodes, width) tokens, log probabilities and confidence."""
    logs = table[1]  # (nodes, width)
    kept = logs > -np.inf
    if most is not None and most < logs.size:
        paths = logs + np.array(above)[:, None]  # (nodes, width)
        kept &= paths >= np.partition(paths, -most, None)[-most]
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
