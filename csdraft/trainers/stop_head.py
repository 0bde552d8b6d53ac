"""Trains the head of the schedule `stop_head`: collect verified drafts, fit a small network, measure it on the data.

SpecDec++ (arXiv 2405.19715) trains on the soft labels min(1, target / draft probability) at positions of mixed texts,
with a binary cross-entropy that weighs rejections more. Here the labels are a verifier's decisions while a text was
decoded, on the same kind of drafts that the head will see in use. Tokens after a rejection are not used: they were
never tried.

    examples = harvest(target, drafter, batches, max_new_tokens=256)
    fit(examples).save("head.safetensors")           # then schedule=StopHead("head.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from csdraft.decoding.interfaces import Budget, Context, Drafter, Round, Schedule
from csdraft.tables.acceptance_head import AcceptanceHead

__all__ = ["Examples", "fit", "harvest", "judge"]

BINS = 10
"""Of the calibration error."""
FEWEST = 32
"""Examples that `fit` needs."""
PRIOR = 30.0
"""Weight decay counts as this many examples. Without it, a head fitted to a few hundred is worse than confidence."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Drafted tokens that a target has verified.

    Attributes:
        heard: (examples, 3) confidence, entropy and depth of each token.
        kept: (examples,) bool, whether it was accepted.
    """

    heard: np.ndarray
    kept: np.ndarray

    def __len__(self) -> int:
        return len(self.kept)

    def split(self, share: float) -> tuple[Examples, Examples]:
        """The first `share` of the examples, and the rest, which come from later texts."""
        at = int(len(self) * share)
        return Examples(self.heard[:at], self.kept[:at]), Examples(self.heard[at:], self.kept[at:])


class RecordingSchedule(Schedule):
    """Drafts to a fixed depth. Records a stop rule's inputs for each token, and whether the token was accepted."""

    def __init__(self, depth: int):
        self.depth = depth
        self.heard: list[tuple[float, float, int]] = []
        self.kept: list[bool] = []
        self._rows: dict[int, list[tuple[float, float, int]]] = {}

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        self._rows = {context.row: [] for context in contexts}
        depths = [min(self.depth, room) for room in rooms]
        stops = [partial(self._record, context.row) for context in contexts]
        return [Budget(d, d, confidence=True, stop=stop) for d, stop in zip(depths, stops, strict=True)]

    def _record(self, row: int, confidence: float, entropy: Callable[[], float]) -> bool:
        """A stop rule that notes its inputs and never stops."""
        self._rows[row].append((confidence, entropy(), len(self._rows[row])))
        return False

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        for finished in rounds:
            draft, verdict, start = finished.draft, finished.verdict, len(finished.context.draft)
            accepted = set(verdict.accepted)
            tip = verdict.accepted[-1] if accepted else finished.context.tip
            refused = draft.children(tip)[:1] if verdict.next_token is not None else ()
            # Tokens of a statistical drafter have no confidence (nan), and are skipped.
            nodes = [node for node in range(start, len(draft)) if not np.isnan(draft.confidence[node])]
            for node, heard in zip(nodes, self._rows[finished.context.row], strict=False):
                if node in accepted or node in refused:
                    self.heard.append(heard)
                    self.kept.append(node in accepted)


def harvest(
    target: Any, drafter: Drafter, batches: Iterable[Mapping[str, Any]], depth: int = 8, **options: Any
) -> Examples:
    """Decodes texts, and collects each drafted token's confidence, entropy, depth and whether it was accepted.

    Args:
        target: a model whose `generate` takes `assistant=`.
        drafter: drafts chains with a model, alone or in a cascade.
        batches: inputs of `generate`.
        depth: draft tokens per round; a deeper draft gives examples of deeper tokens.
        options: of `generate`: the verifier, sampling and length that the head will be used with.
    """
    recording = RecordingSchedule(depth)
    for batch in batches:
        target.generate(**batch, assistant=drafter, schedule=recording, strict=True, reuse=False, **options)
    heard = np.array(recording.heard, dtype=np.float64).reshape(-1, 3)
    return Examples(heard, np.array(recording.kept, dtype=bool))


def fit(
    examples: Examples, hidden: int = 16, rejected_weight: float = 1.0, steps: int = 300, seed: int = 0
) -> AcceptanceHead:
    """A head fitted to examples by weighted binary cross-entropy.

    Args:
        rejected_weight: weight of a rejected token; an accepted one has 1. With 1 the head predicts probabilities.
            Above 1 it predicts less and stops sooner: SpecDec++ takes 6.

    Raises:
        ValueError: there are too few examples, or all are accepted, or all rejected.
    """
    if len(examples) < FEWEST or examples.kept.all() or not examples.kept.any():
        raise ValueError(
            f"{len(examples)} verified tokens, {int(examples.kept.sum())} of them kept: at least {FEWEST} are needed, "
            "some kept and some not; harvest more texts, with a drafter that has a model"
        )
    table = [AcceptanceHead.features(c, h, int(d)) for c, h, d in examples.heard]
    features = torch.tensor(table, dtype=torch.float32)  # (examples, 3)
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)  # (3,)
    kept = torch.from_numpy(examples.kept).float()
    weights = torch.where(kept > 0, 1.0, rejected_weight)
    generator = torch.Generator().manual_seed(seed)
    first, last = nn.Linear(features.shape[1], hidden), nn.Linear(hidden, 1)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    optimizer = torch.optim.Adam(
        [*first.parameters(), *last.parameters()], lr=0.02, weight_decay=min(0.1, PRIOR / len(examples))
    )
    inputs = (features - mean) / scale
    with torch.enable_grad():
        for _ in range(steps):
            logits = last(nn.functional.silu(first(inputs)))[:, 0]
            losses = nn.functional.binary_cross_entropy_with_logits(logits, kept, reduction="none")
            loss = (weights * losses).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    parts = (mean, scale, first.weight, first.bias, last.weight[0], last.bias[0])
    return AcceptanceHead(*(part.detach().numpy() for part in parts))


def judge(head: AcceptanceHead | None, examples: Examples) -> dict[str, float]:
    """How well predicted probabilities fit examples: mean cross-entropy in nats, and expected calibration error.

    Args:
        head: None measures the confidences themselves.
    """
    chances = examples.heard[:, 0]  # (examples,)
    if head is not None:
        chances = np.array([head(c, h, int(d)) for c, h, d in examples.heard])
    clipped, kept = chances.clip(1e-6, 1 - 1e-6), examples.kept
    entropy = -np.where(kept, np.log(clipped), np.log1p(-clipped)).mean()
    bins = np.minimum((chances * BINS).astype(int), BINS - 1)
    gaps = [abs(chances[bins == b].sum() - kept[bins == b].sum()) for b in range(BINS)]
    return {"cross_entropy": float(entropy), "calibration_error": float(sum(gaps) / len(kept))}
