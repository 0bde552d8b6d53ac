"""Block efficiency as a metric for Hugging Face `evaluate`, which loads this file by its path.

    block_efficiency = evaluate.load("csdraft/metrics/block_efficiency.py")
    block_efficiency.compute(predictions=[64, 64], references=[20, 25])  # tokens, calls of the target

`csdraft.metrics.measures.tokens_per_call` computes the same without `evaluate`. This file needs
`pip install csdraft[train]`.
"""

from __future__ import annotations

import datasets
import evaluate

from csdraft.metrics.measures import tokens_per_call

__all__ = ["BlockEfficiency"]

INPUTS = """
predictions: (texts,) tokens emitted.
references: (texts,) calls of the target.
"""

CITATION = "Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192."


class BlockEfficiency(evaluate.Metric):
    """Tokens per call of the target, over all texts together; plain decoding has 1.

    Papers also call it mean acceptance length. See `csdraft.metrics.measures.tokens_per_call`.
    """

    def _info(self) -> evaluate.MetricInfo:
        count = datasets.Value("int64")
        features = datasets.Features({"predictions": count, "references": count})
        return evaluate.MetricInfo(str(self.__doc__), CITATION, features, INPUTS)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"block_efficiency": tokens_per_call(predictions, references)}
