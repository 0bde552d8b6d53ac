"""Block efficiency: tokens that one call of the target yields, the number that drafters are made for.

A plain function, and a metric that `evaluate.load("csdraft/metrics/block_efficiency.py")` loads. Papers also call it
mean acceptance length; the target's own token of each round is counted, so that plain decoding has 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["block_efficiency"]


class Counted(Protocol):
    """What is needed of a `csdraft.Report`."""

    @property
    def emitted(self) -> int: ...
    @property
    def rounds(self) -> int: ...


def block_efficiency(emitted: Counted | Sequence[int] | int, rounds: Sequence[int] | int | None = None) -> float:
    """Emitted tokens / rounds, over all texts together.

    Args:
        emitted: a call's `Report`, and nothing else; or tokens generated, as a number or one per text.
        rounds: calls of the target for a text, likewise; its first one, which also reads the prompt, included.

    Raises:
        ValueError: if there was no round.
    """
    if rounds is None:
        return block_efficiency(emitted.emitted, emitted.rounds)  # type: ignore[union-attr]
    tokens, calls = (count if isinstance(count, int) else sum(count) for count in (emitted, rounds))  # type: ignore[arg-type]
    if calls < 1:
        raise ValueError(f"{tokens} tokens in {calls} calls of the target: nothing was decoded, or it was not counted")
    return tokens / calls


# `evaluate.load` runs this file and looks for the class; nobody else needs it, nor the seconds that importing takes.
if "evaluate" in sys.modules:
    import datasets
    import evaluate

    class BlockEfficiency(evaluate.Metric):
        """`compute(predictions=emitted, references=rounds)`, see `_info`."""

        def _info(self) -> evaluate.MetricInfo:
            count = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Tokens emitted per call of the target.",
                citation="arXiv 2211.17192",
                inputs_description="predictions: tokens generated, of each text. references: the target's calls for it.",
                features=datasets.Features({"predictions": count, "references": count}),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"block_efficiency": block_efficiency(list(predictions), list(references))}
