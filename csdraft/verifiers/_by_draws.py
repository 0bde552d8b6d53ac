"""The rule of inner reviewers under independent draws: the rule that is exact for the draft at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler
from csdraft.verifiers.rejection import Rejection
from csdraft.verifiers.spec_hub import SpecHub
from csdraft.verifiers.without_replacement import WithoutReplacement

__all__ = ["ByDraws"]


@dataclass(frozen=True)
class ByDraws(Verifier):
    """Verifies each draft by the rule that is exact for the way its siblings were drawn."""

    lossless = True  # type: ignore[assignment]
    draws: ClassVar = "independent"
    kinds: ClassVar = frozenset({"iid", "without_replacement", "pair"})

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        return self._rule(draft).verify(draft, scores, sampler, root)

    def refusal(self, draft: Draft) -> str | None:
        return self._rule(draft).refusal(draft)

    @staticmethod
    def _rule(draft: Draft) -> Verifier:
        kind = "iid" if draft.probs is None else draft.probs.kind
        return {"iid": Rejection, "without_replacement": WithoutReplacement, "pair": SpecHub}[kind]()
