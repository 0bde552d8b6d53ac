"""From the logits after a node to its children in a tree: the likeliest tokens, or draws from the model's law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csdraft.decoding.draft import Kind
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import NAN, Scores

__all__ = ["Children", "expand"]


@dataclass(eq=False)
class Children:
    """The children of one node, in the order they are proposed; see `Growth` for what the numbers mean.

    Attributes:
        law: (vocab,) what they were drawn from; None if they were chosen.
    """

    tokens: list[int]
    log_probs: list[float]
    perturbed: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    law: Tensor | None = None


def expand(
    scores: Scores,
    nodes: Sequence[int],
    width: int,
    draws: Kind | None,
    confidence: bool = False,
    above: Sequence[float] = (),
    most: int | None = None,
) -> list[Children]:
    """At most `width` children of each node that was scored: chosen, or drawn where draws are independent.

    Args:
        scores: of one forward, with the logits after just these nodes.
        draws: how independent draws are made; see `Tree.draws`.
        confidence: whether to compute the children's softmax probabilities at the call's temperature.
        above: (nodes,) log probability of each node's own path, which `most` goes by.
        most: keep so many of all children, those with the likeliest paths (and equals of the last of them).
    """
    head, sampler = scores.head, scores.head.sampler
    if draws is not None and most is not None:
        raise ValueError(f"most={most} leaves out tokens for what they are; a tree that draws {draws!r} must not")
    if head.processing.text_blind:
        values = head.processing.all_at_once(scores.logits).float()
    else:
        values = torch.stack([scores.processed(node) for node in nodes]).float()
    if sampler.greedy or sampler.coupled or draws is None:
        if sampler.coupled and not sampler.greedy:
            values = values - _noise(scores, nodes, values.device)
        children = _likeliest(values, width, above, most)
    else:
        children = [_drawn(scores.row, sampler, row, width, draws) for row in values.log_softmax(-1)]
    if confidence:
        temperature = 1.0 if sampler.greedy else head.processing.temperature
        for own, row in zip(children, (scores.logits.float() / temperature).softmax(-1), strict=True):
            own.confidence = row[own.tokens].tolist()
    return children


def _noise(scores: Scores, nodes: Sequence[int], device: torch.device) -> Tensor:
    """(nodes, vocab) the noise of the position after each node, which siblings and cousins share."""
    positions = [scores.position(node) for node in nodes]
    own = {p: scores.head.sampler.log_exponential(scores.row, p, device) for p in set(positions)}
    return torch.stack([own[position] for position in positions])


def _likeliest(values: Tensor, width: int, above: Sequence[float], most: int | None) -> list[Children]:
    """From (nodes, vocab) scores, in one copy to the host."""
    top = values.log_softmax(-1).topk(min(width, values.shape[-1]), -1)
    tokens, logs = torch.stack([top.indices.double(), top.values.double()]).cpu().numpy()
    if np.isnan(logs).any():
        raise ValueError(NAN)
    kept = logs > -np.inf
    if most is not None and most < logs.size:
        paths = logs + np.array(above)[:, None]
        kept &= paths >= np.partition(paths, -most, None)[-most]
    counts = kept.sum(1).tolist()  # children come by probability, so that those kept are the first
    return [
        Children(own.tolist(), log_prob.tolist())
        for own, log_prob in ((tokens[i, :count].astype(np.int64), logs[i, :count]) for i, count in enumerate(counts))
    ]


def _drawn(row: int, sampler: Sampler, log_probs: Tensor, width: int, draws: Kind) -> Children:
    """From (vocab,) log probabilities: fresh draws, in the order in which a verifier must try them."""
    law, perturbed = log_probs.exp(), []
    if draws == "iid":
        tokens = [sampler.draw(row, law) for _ in range(width)]
    elif draws == "without_replacement":  # Gumbel-top-k: Kool, van Hoof and Welling, arXiv 1903.06059
        values = log_probs - sampler.fresh_log_exponential(row, log_probs.device)
        top = values.topk(min(width, int((law > 0).sum())))
        tokens, perturbed = top.indices.tolist(), top.values.tolist()
    else:
        tokens = _pair(row, sampler, law)[:width]
    return Children(tokens, log_probs[tokens].tolist(), perturbed, law=law)


def _pair(row: int, sampler: Sampler, law: Tensor) -> list[int]:
    """SpecHub's two draws (arXiv 2411.05289): one is the likeliest token, the other from the law."""
    hub, first = int(law.argmax()), sampler.draw(row, law)
    if first != hub:
        return [first, hub]
    others = law.clone()
    others[hub] = 0
    return [hub, sampler.draw(row, others)] if others.sum() > 0 else [hub]
