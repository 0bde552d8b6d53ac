"""Match: step into the child that carries the reviewer's own token, while there is one.

The reviewer's token at a node is its argmax, or under sampling its argmax with the position's noise (Gumbel-max).
Every drafter draws with the same noise (drafter-invariant coupling: Daliri, Musco, Suresh, arXiv 2408.07978). So the
text never depends on the drafter: the rule is lossless for any draft, tree, stop rule or lenience of inner reviewers,
and needs no draft probabilities. Use it unless you want to compare with a rule from the literature.
"""

from __future__ import annotations

from dataclasses import dataclass

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import ScoresView, Verdict, Verifier
from csdraft.decoding.sampling import Sampler

__all__ = ["Match"]


@dataclass(frozen=True)
class Match(Verifier):
    """Accepts a node if it carries the reviewer's token (see the module)."""

    lossless = True  # type: ignore[assignment]

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        accepted, node = [], root
        while True:
            kept = self.keeps(draft, node, scores, sampler)
            if kept is None:
                token = scores.choice(node)
                return Verdict(accepted, token, scores.ends(node, token))
            accepted.append(kept)
            if scores.ends(node, draft.tokens[kept]):
                return Verdict(accepted, None, True)
            node = kept

    def keeps(self, draft: Draft, node: int, scores: ScoresView, sampler: Sampler) -> int | None:
        """The child of `node` to step into; None if no child carries the reviewer's token."""
        return draft.child(node, scores.choice(node))
