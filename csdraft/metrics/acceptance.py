"""How often a target would accept what a drafter says, from both models' logits: expected acceptance and agreement.

Two plain functions, and a metric that `evaluate.load("csdraft/metrics/acceptance.py")` loads. Both compare next-token
distributions along a text, which should be the target's own, and at the temperature of deployment: acceptance rises
and falls with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_position", "expected_acceptance", "greedy_agreement"]


def expected_acceptance(student_logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The chance that rejection sampling accepts a token drawn from the student, sum over tokens of min(both).

    Leviathan et al., arXiv 2211.17192, theorem 3.5.

    Args:
        student_logits: (*rows, vocab) of any float dtype, computed in float32.
        target_logits: (*rows, vocab) likewise; the wider of the two vocabularies is cut to the other, its padding.
        temperature: above 0, of both.

    Returns:
        (*rows) float32 from 0 to 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; for greedy decoding use greedy_agreement")
    width = min(student_logits.shape[-1], target_logits.shape[-1])
    probs = ((logits[..., :width].float() / temperature).softmax(-1) for logits in (student_logits, target_logits))
    return torch.minimum(*probs).sum(-1)


def greedy_agreement(student_logits: Tensor, target_logits: Tensor) -> Tensor:
    """1 where student and target have the same most probable token, else 0: acceptance at temperature 0.

    Args:
        student_logits: (*rows, vocab).
        target_logits: (*rows, vocab).

    Returns:
        (*rows) float32.
    """
    return (student_logits.argmax(-1) == target_logits.argmax(-1)).float()


def by_position(texts: Sequence[Sequence[float]]) -> list[float]:
    """Means at each position over the texts that reach it.

    Args:
        texts: values at each position of each text.
    """
    columns = ([value for value in column if value is not None] for column in zip_longest(*texts))
    return [sum(column) / len(column) for column in columns]


# `evaluate.load` runs this file and looks for the class; nobody else needs it, nor the seconds that importing takes.
if "evaluate" in sys.modules:
    import datasets
    import evaluate

    class Acceptance(evaluate.Metric):
        """`compute(predictions=student_logits, references=target_logits, temperature=1.0)`, see `_info`."""

        def _info(self) -> evaluate.MetricInfo:
            logits = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
            return evaluate.MetricInfo(
                description="Expected acceptance and greedy agreement of a drafter with its target.",
                citation="arXiv 2211.17192, theorem 3.5",
                inputs_description=(
                    "predictions: of each text the student's logits, (positions, vocab). references: the target's. "
                    "temperature: of both, 1.0 if not given."
                ),
                features=datasets.Features({"predictions": logits, "references": logits}),
            )

        def _compute(self, predictions: Any, references: Any, temperature: float = 1.0) -> dict[str, Any]:
            pairs = [(torch.tensor(s), torch.tensor(t)) for s, t in zip(predictions, references, strict=True)]
            accepted = [expected_acceptance(*pair, temperature).tolist() for pair in pairs]
            agreed = [greedy_agreement(*pair).tolist() for pair in pairs]
            positions = sum(map(len, accepted))
            return {
                "acceptance": sum(map(sum, accepted)) / positions,
                "agreement": sum(map(sum, agreed)) / positions,
                "acceptance_by_position": by_position(accepted),
                "agreement_by_position": by_position(agreed),
            }
