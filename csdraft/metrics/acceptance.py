"""Expected acceptance and greedy agreement as a metric for Hugging Face `evaluate`, which loads this file by its path.

    acceptance = evaluate.load("csdraft/metrics/acceptance.py")
    acceptance.compute(predictions=draft_logits, references=target_logits, positions=[1, 2, 3, 1, 2, 3])

The functions in `csdraft.metrics.measures` compute the same without `evaluate`. This file needs
`pip install csdraft[train]`.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch

from csdraft.metrics.measures import by_position, expected_acceptance, greedy_agreement

__all__ = ["Acceptance"]

INPUTS = """
predictions: (count, vocab) logits of the drafter.
references: (count, vocab) logits of the target.
temperature: divides both for `acceptance`; 1 if not given.
positions: (count,) integers; if given, means by position are returned too.
"""

CITATION = "Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192."


class Acceptance(evaluate.Metric):
    """How often a target accepts drafted tokens.

    For sampled drafts it is the sum over tokens of the smaller probability (`expected_acceptance`), for greedy drafts
    the share of positions where both models have the same most probable token (`greedy_agreement`); both functions
    are in `csdraft.metrics.measures`.
    """

    def _info(self) -> evaluate.MetricInfo:
        logits = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features({"predictions": logits, "references": logits})
        return evaluate.MetricInfo(str(self.__doc__), CITATION, features, INPUTS)

    def _compute(
        self, predictions: Any, references: Any, temperature: float = 1.0, positions: list[int] | None = None
    ) -> dict[str, Any]:
        draft, target = torch.tensor(predictions), torch.tensor(references)  # (count, vocab) each
        accepted, agreed = expected_acceptance(draft, target, temperature), greedy_agreement(draft, target)
        figures: dict[str, Any] = {"acceptance": float(accepted.mean()), "agreement": float(agreed.float().mean())}
        if positions is not None:
            where = torch.as_tensor(positions)
            figures["acceptance_by_position"] = by_position(accepted, where)
            figures["agreement_by_position"] = by_position(agreed, where)
        return figures
